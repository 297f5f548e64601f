"""Several sources drawn in fixed proportion. Which part stands where is decided by the global order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import canonical_json
from pretrain.config.registry import SOURCES, resolve
from pretrain.config.source import DataConfig, MixtureConfig
from pretrain.data.batch import Batch, EpochSource, SampleSource
from pretrain.errors import ConfigError, UserError

_PART_SHIFT = 48


def pack(parts: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """One id for a part of a mixture and a sample of it. Samples of part 0 keep their id, so any source takes it."""
    return parts << _PART_SHIFT | samples


class MixtureSource:
    """The parts of a mixture behind one source; ids are made by `pack`."""

    def __init__(self, parts: Sequence[SampleSource], *, weights: Sequence[float], period: int,
                 stages: Sequence[tuple[int, Sequence[float]]] = ()) -> None:
        """`stages`: (first batch, weights) of each stage of a curriculum after the first, whose weights are `weights`.

        """
        self.parts, self.weights, self.period = list(parts), list(weights), period
        self.stages = [(batches, list(weights)) for batches, weights in stages]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parts' fingerprints, weights, the period and later stages."""
        later = {"stages": self.stages} if self.stages else {}
        return hashlib.sha256(canonical_json({
            "kind": "mixture", "parts": [part.fingerprint for part in self.parts], "weights": self.weights,
            "period": self.period, **later})).hexdigest()

    def __len__(self) -> int:
        """A mixture has no epochs. Raises TypeError."""
        raise TypeError("a mixture has no length: its parts come round at different times")

    def get(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The samples [B] of packed ids. Raises UserError where parts disagree about their tensors."""
        return self.get_in_epoch(sample_ids, np.zeros_like(sample_ids))

    def get_in_epoch(self, sample_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The samples as they are in the epochs [B] of their parts."""
        numbers, samples = sample_ids >> _PART_SHIFT, sample_ids & ((1 << _PART_SHIFT) - 1)
        tensors: dict[str, torch.Tensor] = {}
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            source = self.parts[number]
            found_rows = source.get_in_epoch(samples[rows], epochs[rows]) if isinstance(source, EpochSource) \
                else source.get(samples[rows])
            part = found_rows.tensors
            if not tensors:
                tensors = {name: value.new_empty((len(sample_ids), *value.shape[1:])) for name, value in part.items()}
            shapes = {name: (value.shape[1:], value.dtype) for name, value in tensors.items()}
            found = {name: (value.shape[1:], value.dtype) for name, value in part.items()}
            if shapes != found:
                raise UserError(f"data.source.parts.{number}: its samples hold {found}, those of another part "
                                f"{shapes}; parts of a mixture must give the same tensors")
            index = torch.from_numpy(rows)
            for name, value in part.items():
                tensors[name][index] = value
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), tensors)


def open_mixture(config: MixtureConfig, data: DataConfig) -> MixtureSource:
    """Open the parts through the registry. Raises ConfigError for a mixture in a mixture."""
    parts = []
    for number, part in enumerate(config.parts):
        kind = part.source.kind
        if kind == "mixture":
            raise ConfigError(f"data.source.parts.{number}.source.kind",
                              "a mixture holds no mixtures; multiply the weights and list the parts here")
        parts.append(resolve(SOURCES, kind, f"data.source.parts.{number}.source.kind")(part.source, data))
    first, *later = config.shares([size_of(part) for part in parts])
    starts = itertools.accumulate(stage.steps or 0 for stage in config.curriculum[:-1])
    return MixtureSource(parts, weights=first, period=config.period, stages=list(zip(starts, later, strict=True)))


def size_of(source: SampleSource) -> int | None:
    """Samples of a source; None where it has no end."""
    try:
        return len(source)
    except TypeError:
        return None
