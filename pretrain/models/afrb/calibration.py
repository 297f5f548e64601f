"""What is measured and set before the first step: whitened tables, scale of the memory's logits, the readout map."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.models.afrb.backbone import table_rows
from pretrain.models.afrb.memory import Whitening
from pretrain.models.afrb.model import AFRBForCausalLM
from pretrain.models.afrb.ridge import RidgeFit, fit_ridge

_SCALE = 9.0
"""Of the memory's logits over the backbone's first choice. Of noise that is about 30 standard deviations; the first
choice of a trained model stands further out, twice as far on a small one."""
_LEAST_SCALE = 10.0
_MEASURED_ROWS = 8
"""Samples on which the backbone's logits are measured."""
_ROWS = 64
"""Rows of a sample that are looked at, where the data name none."""
_log = logging.getLogger("pretrain")


class Start(Protocol):
    """The part of `EngineStartContext` that is used here."""

    rank: int
    world_size: int
    device: torch.device

    def train_samples(self, n: int) -> Batch:
        """The first samples of the run."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def full_parameter(self, name: str, write: Tensor | None = None) -> Tensor:
        """The whole parameter on every rank; set first where a value is given."""

    def gathered_in_use(self) -> AbstractContextManager[None]:
        """Within it the model can be called."""


@torch.no_grad()
def whiten_tables(model: AFRBForCausalLM) -> None:
    """Fit a matrix memory's whitening and row norms to the backbone's tables. Call once the tables are what they stay.

    Kept in buffers, so checkpoints and exports have them.
    """
    memory = model.memory
    if memory is None:
        return
    device = memory.inverse_norms.device
    for whitening, table in ((memory.input_rows, model.get_input_embeddings()),
                             (memory.output_rows, model.get_output_embeddings())):
        whitening.fit(partial(table_rows, table, model.schema.vocab_size, device))
    if model.schema.pvm_row_norm:
        blocks = table_rows(model.get_output_embeddings(), model.schema.vocab_size, device)
        norms = torch.cat([memory.output_rows(rows).norm(dim=-1) for rows in blocks])
        memory.inverse_norms.copy_(1 / norms.clamp(min=1e-6))


@torch.no_grad()
def set_scale(model: AFRBForCausalLM, ctx: Start) -> float:
    """Start the memory's logits at 9 times what the backbone's first choices stand above their mean. Returns the scale.

    Every rank measures the same samples, so that the scale does not depend on their number; one at a time, as there may
    be memory for no more.
    """
    samples = ctx.train_samples(_MEASURED_ROWS)
    return _scale_from(model, (_inputs(samples.rows(row, row + 1).to(ctx.device)) for row in range(len(samples))))


@torch.no_grad()
def set_scale_without_data(model: AFRBForCausalLM, seed: int) -> float:
    """The same on random ids of the whole vocabulary, where no samples are at hand. Returns the scale."""
    draw = torch.Generator().manual_seed(seed)
    length = min(_ROWS, model.schema.max_seq_len or _ROWS)
    ids = torch.randint(model.schema.vocab_size, (_MEASURED_ROWS, 1, length), generator=draw)
    return _scale_from(model, ({"input_ids": row.to(model.device)} for row in ids))


def _scale_from(model: AFRBForCausalLM, samples: Iterable[dict[str, Tensor]]) -> float:
    assert model.memory is not None
    above = []
    for inputs in samples:
        logits = model(**inputs, return_logits=True, logits_to_keep=_ROWS, controls={"readout_off": 1.0}).logits.float()
        above.append(float((logits.amax(-1) - logits.mean(-1)).mean()))
    scale = max(_LEAST_SCALE, _SCALE * sum(above) / len(above))
    model.memory.log_scale.start.fill_(math.log(scale))
    return scale


@torch.no_grad()
def fit_readout(model: AFRBForCausalLM, ctx: Start) -> RidgeFit:
    """Fit the readout map to pairs (what the memory says, row of the wanted token) of training samples. Collective.

    Each rank computes its share of the samples, all get all pairs, so the fit is the same on every rank.
    """
    cfg = model.schema
    features, targets = collect_pairs(model, ctx, cfg.kiss_ridge_max_pairs)
    fit = fit_ridge(features, targets, cfg.kiss_ridge_l2, absolute=cfg.kiss_ridge_l2_absolute)
    _log.info("[KISS-RIDGE] Calibrated pvm2emb: %d pairs, λ=%g", fit.pairs, cfg.kiss_ridge_l2)
    _log.info("[KISS-RIDGE] R2 train=%.4f heldout=%.4f", fit.r2_train, fit.r2_heldout)
    _log.info("[KISS-RIDGE] cosine train=%.4f heldout=%.4f rank=%d condition=%.3g", fit.cosine_train,
              fit.cosine_heldout, fit.rank, fit.condition)
    return fit


def set_readout(model: AFRBForCausalLM, ctx: Start, fit: RidgeFit) -> None:
    """Take the fitted map. Collective; not while weights are gathered."""
    name = "memory.project" if model.memory is not None else "readout.project"
    ctx.full_parameter(name, fit.weight.T.float().contiguous())
    assert model.calibrated is not None
    model.calibrated.fill_(1.0)


def collect_pairs(model: AFRBForCausalLM, ctx: Start, wanted: int) -> tuple[Tensor, Tensor]:
    """(features [N, d], targets [N, D]) fp64 on every rank, on the host, in the order of the samples. Collective."""
    samples = -(-wanted // _rows_per_sample(ctx.train_samples(1)))
    samples += -samples % ctx.world_size
    batch = _own_rows(ctx.train_samples(samples), ctx)
    whitening = _dual(model, ctx.device)
    features, targets = [], []
    for start in range(len(batch)):
        said, wanted_rows = _pairs(model, batch.rows(start, start + 1))
        if whitening is not None:
            wanted_rows = whitening(wanted_rows)
            if model.memory is None:  # a matrix memory maps back by itself
                wanted_rows = whitening.back(wanted_rows)
        features.append(said.cpu().double())
        targets.append(wanted_rows.cpu().double())
    return _gather(torch.stack(features), ctx)[:wanted], _gather(torch.stack(targets), ctx)[:wanted]


def _pairs(model: AFRBForCausalLM, sample: Batch) -> tuple[Tensor, Tensor]:
    """Of one sample: what is said [R, d] and rows of the wanted tokens [R, D], fp32."""
    inputs = _inputs(sample)
    if "readout_positions" not in inputs:
        length = sample["input_ids"].shape[1]
        rows = torch.linspace(0, length - 1, min(_ROWS, length), device=sample["input_ids"].device).long()
        inputs["readout_positions"] = rows[None]
    output = model(**inputs, diagnostics=True)
    wanted = sample["labels"].gather(1, inputs["readout_positions"]).clamp(min=0)
    return output.diagnostics["readout"][0], model.get_output_embeddings()(wanted)[0].float()


def _dual(model: AFRBForCausalLM, device: torch.device) -> Whitening | None:
    """Whitening of the targets: a matrix memory's own, or one for a vector memory that is to have dual rows."""
    if model.memory is not None:
        return model.memory.output_rows
    if model.schema.kiss_ridge_target == "rows":
        return None
    whitening = Whitening(model.schema.hidden_size).to(device)
    whitening.fit(partial(table_rows, model.get_output_embeddings(), model.schema.vocab_size, device))
    return whitening


def _rows_per_sample(sample: Batch) -> int:
    positions = sample.tensors.get("readout_positions")
    return int(positions.shape[1]) if positions is not None else min(_ROWS, sample["input_ids"].shape[1])


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What forward takes of a batch, labels left out."""
    names = ("input_ids", "document_ids", "attention_mask", "readout_positions")
    return {name: batch[name] for name in names if name in batch.tensors}


def _own_rows(batch: Batch, ctx: Start) -> Batch:
    """Consecutive samples of this rank."""
    share = len(batch) // ctx.world_size
    return batch.rows(ctx.rank * share, (ctx.rank + 1) * share).to(ctx.device)


def _gather(own: Tensor, ctx: Start) -> Tensor:
    """[samples, R, d] of each rank -> [all samples * R, d] on every rank, in rank order."""
    if ctx.world_size == 1:
        return own.flatten(0, 1)
    whole = torch.zeros(ctx.world_size, *own.shape, dtype=own.dtype, device=ctx.device)
    whole[ctx.rank] = own.to(ctx.device)
    return ctx.all_reduce(whole).flatten(0, 2).cpu()
