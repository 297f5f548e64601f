"""Texts to vectors, in training and afterwards: batched, sorted by length, every rank its share.

An encoder's vectors must not depend on what else is in the batch; the padding gate holds models to that, so sorting by
length is free to choose the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from data_prep.manifest import TOKENIZER
from data_prep.manifest import Manifest as DatasetManifest
from data_prep.tokenizer import load_tokenizer
from pretrain.config.suggest import nearest
from pretrain.errors import UserError
from pretrain.models.base import EncoderOutput

WIDTH_MULTIPLE = 8
BATCH_SIZE = 64
Rows = Sequence[Sequence[int]]
"""Token ids of texts, special ones included."""

Pick = Callable[[EncoderOutput], dict[str, torch.Tensor]]


class View(Protocol):
    """What encoding needs of a model: `RunView` has it, `Alone` gives it to a model in this process."""

    rank: int
    world: int
    device: torch.device

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """The model in eval mode without gradient; collective."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A model of this process alone."""

    call: Callable[..., Any]
    device: torch.device
    rank: int = 0
    world: int = 1

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """The model's forward."""
        return self.call(controls=controls, **inputs) if controls else self.call(**inputs)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Nothing to add."""
        return tensor


@dataclass(frozen=True)
class TextTokens:
    """Texts to rows of ids as the model saw them in training."""

    tokenizer: Tokenizer
    prefix: list[int]
    suffix: list[int]
    pad_id: int
    max_length: int
    """Tokens a text, special ones included."""

    @classmethod
    def of_dataset(cls, folder: Path, max_length: int) -> TextTokens:
        """As a prepared dataset of pairs has them. Raises UserError where the folder holds no such dataset."""
        manifest = DatasetManifest.load(folder)
        manifest.require("pairs")
        assert manifest.pairs is not None
        return cls(load_tokenizer(folder / TOKENIZER), manifest.pairs.prefix_ids, manifest.pairs.suffix_ids,
                   manifest.pairs.pad_id, max_length)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """prefix + ids of the text, cut to fit + suffix."""
        room = self.max_length - len(self.prefix) - len(self.suffix)
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*self.prefix, *e.ids[:room], *self.suffix] for e in encoded]

    def around(self, rows: Rows) -> list[list[int]]:
        """Rows of stored ids, which have no special tokens, cut and framed in the same way."""
        room = self.max_length - len(self.prefix) - len(self.suffix)
        return [[*self.prefix, *row[:room], *self.suffix] for row in rows]


@torch.no_grad()
def encode(view: View, rows: Rows, *, pad_id: int, heads: Sequence[str] | None = None, batch_size: int = BATCH_SIZE,
           progress: Callable[[int], None] | None = None, pick: Pick | None = None) -> dict[str, torch.Tensor]:
    """Vectors of rows of ids by head, on every rank. Collective.

    Args:
        view: the model.
        rows: [n] of at least one id each.
        pad_id: what fills up a row; padded places are masked.
        heads: which heads; None: the model's default one, under its name.
        batch_size: rows a forward.
        progress: told the number of rows after each of this rank's forwards.
        pick: in place of `heads`: what is kept of an output, [b, d] by name.

    Returns:
        fp32 [n, d] by head, in the order of `rows`.

    Raises:
        UserError: for a head that the model does not have.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[str, torch.Tensor] = {}
    for turn in range(-(-len(batches) // view.world)):
        index = turn * view.world + view.rank
        # Every rank runs the same number of forwards: one that has no batch left repeats the last and drops the result.
        chosen = batches[min(index, len(batches) - 1)]
        ids, mask = pad([rows[i] for i in chosen], pad_id)
        output = view.forward(input_ids=ids.to(view.device), attention_mask=mask.to(view.device))
        for name, vectors in (pick(output) if pick is not None else _chosen(output, heads)).items():
            if name not in found:
                found[name] = torch.zeros(len(rows), vectors.shape[-1], device=view.device)
            if index < len(batches):
                found[name][chosen] = vectors.float()
        if progress is not None and index < len(batches):
            progress(len(chosen))
    return {name: view.all_reduce(vectors) for name, vectors in sorted(found.items())}


def pad(rows: Rows, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64, mask bool), both [b, longest row rounded up to a multiple of 8]."""
    width = -(-max(map(len, rows)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = True
    return ids, mask


def _chosen(output: EncoderOutput, heads: Sequence[str] | None) -> dict[str, torch.Tensor]:
    assert output.heads is not None
    assert output.default is not None
    names = [output.default] if heads is None else heads
    for name in names:
        if name not in output.heads:
            raise UserError(f'head "{name}": the model has no such head{nearest(name, output.heads)}; it has '
                            f"{', '.join(sorted(output.heads))}")
    return {name: output.heads[name] for name in names}


def shorten(vectors: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The first `dim` coordinates of vectors [n, d] at length 1; None: all of them.

    Raises UserError where there are fewer.
    """
    if dim is not None and not 1 <= dim <= vectors.shape[-1]:
        raise UserError(f"--dim {dim}: the vectors have {vectors.shape[-1]} coordinates")
    return torch.nn.functional.normalize(vectors[..., :dim].float(), dim=-1)
