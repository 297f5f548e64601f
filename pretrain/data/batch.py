"""What flows from a source to an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one micro-batch: their global ids and named tensors whose first axis is the sample."""

    sample_ids: torch.Tensor
    """[B] int64: position of each sample in the global order of the run (never of the rank)."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.sample_ids.shape[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies are asynchronous from pinned memory."""
        return Batch(self.sample_ids, {k: v.to(device, non_blocking=True) for k, v in self.tensors.items()})

    def rows(self, start: int, stop: int) -> Batch:
        """Samples [start, stop) as views."""
        return Batch(self.sample_ids[start:stop], {k: v[start:stop] for k, v in self.tensors.items()})


@runtime_checkable
class SampleSource(Protocol):
    """Samples by id. Shards are one source, a generator of needles another."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content or parameters: two sources with the same fingerprint give the same samples."""

    def __len__(self) -> int:
        """Number of samples of an epoch. Sources without end raise TypeError."""

    def get(self, sample_ids: np.ndarray) -> Batch:
        """The samples [B] int64, in the order asked for."""


@runtime_checkable
class EpochSource(SampleSource, Protocol):
    """A source whose samples hold something drawn anew in every epoch, the negatives of a pair, say."""

    def get_in_epoch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> Batch:
        """The samples [B] as they are in their epochs [B] int64; `get` gives those of epoch 0."""
