"""Contrast of pairs over all ranks, in memory that does not grow with the contrastive batch.

The loss of an update sees all its triplets at once: a rank's texts go through the model in small chunks without
gradient, the vectors of all ranks are gathered, every rank forms the same loss and its gradient by its own vectors, and
a second pass over the same chunks, with the same dropout, carries that gradient into the weights (gradient caching, Gao
et al. 2021, arXiv:2101.06983). See section 6 of the Spectra specification.

Every rank forms the whole loss, so its gradient by a rank's vectors is that of the single-process batch. The engine
averages over ranks what are parts of a sum; the factor W undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.data.batch import Batch
from pretrain.data.pairs import trim
from pretrain.models.base import EncoderOutput
from pretrain.objectives.base import UpdateHandle, UpdateResult
from pretrain.objectives.embedding_losses import TripletIds
from pretrain.objectives.embedding_terms import Layout, Triplets, accuracy, scene, temperature, terms
from pretrain.objectives.text_chunks import Chunk, Texts

_FIGURES = {"attn_entropy": "spectral/attn_entropy", "fusion": "spectral/fusion", "w_frac": "fractal/w_abs"}
"""What an encoder's `aux` tells of its branches, and the metric it is logged as."""


@dataclass
class _Pass:
    """A forward over chunks, and what is left to do with them."""

    layout: Layout
    packed: Tensor
    """[texts, D], detached."""
    chunks: list[Chunk]
    states: list[object]
    """Random state before each chunk; empty where the outputs are kept."""
    outputs: list[Tensor]
    """Packed vectors of each chunk with their graphs; empty where the chunks are run again."""
    figures: dict[str, Tensor]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    """[texts, D]: of the update's loss, times what undoes the averaging over ranks."""


class Contrastive:
    """Pairs of any encoder: the losses of Spectra where it has those heads, else symmetric InfoNCE of the default head.

    Batch: see `PairSource.get`. Metrics: `loss/NAME` of every term, `accuracy`, `temperature`, and what the encoder
    tells of its branches.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    def probe_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The queries, without common padding."""
        texts = Texts.of([batch])
        input_ids, attention_mask = trim(texts.input_ids[0], texts.attention_mask[0])
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def run(self, handle: UpdateHandle, micro_batches: Sequence[Batch], controls: Mapping[str, float]) -> UpdateResult:
        """One update. Where the vectors or losses of any rank are not finite, all ranks leave before a backward.

        The one exception: with `grad_cache` off and several contrastive batches an update, each is carried backward
        before the next is formed; what is not finite then shows in the gradient norm, and the engine skips the update.
        """
        config, size = self.config, len(micro_batches[0])
        at = temperature(config, handle.step, handle.total_steps)
        groups = [list(micro_batches)] if config.contrastive_batch == "update" else [[m] for m in micro_batches]
        at_once = config.grad_cache or len(groups) == 1
        passes, losses = [], []
        for number, group in enumerate(groups):
            texts = Texts.of(group)
            current = self._forward(handle, texts, size)
            losses.append(self._losses(handle, current, texts.ids, at, share=1 / len(groups)))
            passes.append(current)
            if not at_once:
                self._backward(handle, passes.pop(), last=number == len(groups) - 1)
        metrics = _reduced(handle, losses)
        loss, finite = metrics.pop("loss"), metrics.pop("finite")
        metrics["temperature"] = at
        if at_once and not (finite == 1 and all(math.isfinite(value) for value in (loss, *metrics.values()))):
            return UpdateResult(loss, metrics, finite=False)
        for number, current in enumerate(passes):
            self._backward(handle, current, last=number == len(passes) - 1)
        return UpdateResult(loss, metrics, finite=True)

    def _forward(self, handle: UpdateHandle, texts: Texts, size: int) -> _Pass:
        """The vectors of all texts, in chunks: without gradient, or with the graphs kept."""
        cached = self.config.grad_cache
        # The published code pads all texts alike, and its vectors depend on the padding.
        chunks = [texts.stacked()] if self.config.profile == "compat" and not cached else texts.chunks(size)
        states: list[object] = []
        packed: list[Tensor] = []
        figures: dict[str, list[Tensor]] = {}
        layout: Layout | None = None
        for chunk in chunks:
            if cached:
                states.append(handle.rng_state())
            output: EncoderOutput = handle.forward(chunk.batch, grad=not cached)
            layout = layout or Layout.of(output)
            packed.append(layout.pack(output))
            for name in _FIGURES:
                value = (output.aux or {}).get(name)
                if value is not None:
                    figures.setdefault(name, []).append(value.detach().expand(len(chunk.rows)))
        assert layout is not None
        rows = torch.cat([chunk.rows for chunk in chunks])
        joined = torch.cat([part.detach() for part in packed])
        return _Pass(layout, torch.empty_like(joined).index_copy_(0, rows, joined), chunks, states,
                     [] if cached else packed, {name: torch.cat(values).mean() for name, values in figures.items()})

    def _losses(self, handle: UpdateHandle, current: _Pass, ids: TripletIds, at: float, *,
                share: float) -> dict[str, Tensor]:
        """Every term and figure as a scalar; sets the gradient by this rank's vectors.

        Terms are differentiated one after the other, so that only one has what it keeps for its gradient alive.
        """
        config, count = self.config, len(ids.query)
        leaf = current.packed.view(-1, count, current.packed.shape[1]).detach().requires_grad_()
        gathered = config.gather_negatives and handle.world > 1
        total = torch.zeros_like(leaf)
        found: dict[str, Tensor] = {}
        where = scene(config, _triplets(handle if gathered else None, current.layout, leaf, ids), at)
        loss = leaf.new_zeros(())
        for term in terms(config, current.layout):
            value = term.loss(where)
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
            found[f"loss/{term.name}"] = value.detach()
            loss = loss + term.weight * value.detach()
            if gradient is not None:
                total += term.weight * gradient
        # All ranks form one loss, of which the engine then takes the mean; their own losses it averages rightly.
        current.gradient = (total * share * (handle.world if gathered else 1)).flatten(0, 1)
        figures = {_FIGURES[name]: value for name, value in current.figures.items()}
        return {**found, "loss": loss, "finite": torch.isfinite(current.packed).all(), "accuracy": accuracy(where),
                **figures}

    def _backward(self, handle: UpdateHandle, current: _Pass, *, last: bool) -> None:
        """Carry the gradient by the vectors into the weights."""
        if current.outputs:
            parts = zip(current.outputs, current.chunks, strict=True)
            sums = [(output * current.gradient[chunk.rows]).sum() for output, chunk in parts]
            handle.backward(torch.stack(sums).sum(), last=last)
            return
        for number, (chunk, state) in enumerate(zip(current.chunks, current.states, strict=True)):
            vectors = current.layout.pack(handle.forward(chunk.batch, grad=True, rng=state))
            handle.backward((vectors * current.gradient[chunk.rows]).sum(),
                            last=last and number == len(current.chunks) - 1)


def _triplets(handle: UpdateHandle | None, layout: Layout, leaf: Tensor, ids: TripletIds) -> Triplets:
    """The contrastive batch of this rank's vectors `leaf` [2 + N, b, D]; with a handle, of all ranks in rank order.

    Vectors of other ranks carry no gradient: they are constants of this rank's share.
    """
    if handle is not None:
        count = leaf.shape[1]
        rows = leaf.transpose(0, 1)
        everywhere = handle.all_gather(rows)
        before = handle.rank * count
        rows = torch.cat([everywhere[:before], rows, everywhere[before + count:]])
        columns = torch.cat([ids.query[:, None], ids.positive[:, None], ids.negative, ids.has_negative.long()], 1)
        columns = handle.all_gather(columns)
        negatives = ids.negative.shape[1]
        ids = TripletIds(columns[:, 0], columns[:, 1], columns[:, 2:2 + negatives], columns[:, 2 + negatives:].bool())
        leaf = rows.transpose(0, 1)
    return Triplets(layout, leaf[0], leaf[1], leaf[2:].transpose(0, 1), ids)


def _reduced(handle: UpdateHandle, losses: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over contrastive batches and ranks, through the host once: whatever follows from them is agreed."""
    names = sorted(losses[0])
    mean = torch.stack([torch.stack([each[name].double() for name in names]) for each in losses]).mean(0)
    values: list[float] = (handle.all_reduce(mean) / handle.world).tolist()
    return dict(zip(names, values, strict=True))
