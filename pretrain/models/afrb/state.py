"""What step-by-step decoding goes on from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from pretrain.models.afrb.block import BlockState
from pretrain.models.afrb.memory import MatrixState
from pretrain.models.afrb.readout import ReadoutState


@dataclass
class AFRBState:
    """State after some tokens. A forward makes a new one; only the backbone's own key/value cache is written to."""

    blocks: tuple[BlockState, ...]
    memory: MatrixState | ReadoutState | None
    backbone: Any | None
    """transformers' cache, where the backbone attends."""
    length: int
    """Tokens so far."""

    is_compileable = False

    def get_seq_length(self) -> int:
        """Tokens so far, as transformers' caches tell it."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that a beam search goes on with."""
        for field in fields(self):
            if field.name != "backbone":
                setattr(self, field.name, _rows(getattr(self, field.name), beam_idx))
        if self.backbone is not None:
            self.backbone.reorder_cache(beam_idx)

    def numel(self) -> int:
        """Numbers held a row, the backbone's cache left out."""
        return sum(_sizes([self.blocks, self.memory]))


def _rows(value: Any, index: Tensor) -> Any:
    """Rows of every tensor in nested tuples; states of several blocks have the batch on their second axis."""
    if isinstance(value, ReadoutState):
        traces = None if value.traces is None else value.traces.index_select(1, index)
        return ReadoutState(value.hidden.index_select(0, index), traces)
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    if isinstance(value, tuple):
        parts = [_rows(part, index) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _sizes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.numel()]
    return [size for part in value for size in _sizes(part)] if isinstance(value, (tuple, list)) else []
