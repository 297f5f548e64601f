"""Everything that was read, as one long row of items, and what the steps decide about each.

A step writes one byte an item (0: not my concern) and the position of the copy that is kept instead, both in files: the
steps before it are not touched, and a finished step is not done again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import publish, temporary_name
from data_prep.unit import Unit
from data_prep.words import I64
from pretrain.runfolder.publish import fsync

VERDICTS = ("kept", "duplicate", "query_in_other_split", "package_in_other_split", "passage_in_other_split",
            "contaminated", "near_duplicate", "no_tokens")
KEPT, DUPLICATE, QUERY_ELSEWHERE, _, PASSAGE_ELSEWHERE, CONTAMINATED, NEAR_DUPLICATE, NO_TOKENS = range(len(VERDICTS))
"""Names of the verdicts in counts."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What one step decided. [n] each, mapped from files."""

    reason: npt.NDArray[np.uint8]
    keeper: npt.NDArray[np.int64]
    """Position of the item that is kept instead, -1 where there is none."""


@dataclass(slots=True)
class Corpus:
    """The units that hold the items, and the positions where they begin."""

    units: Sequence[Path]
    folder: Path
    """Where verdicts are kept."""
    starts: I64
    """[units + 1] position of the first item of each; see `unit_starts`."""
    steps: list[Verdicts] = field(default_factory=list)
    """Of the finished steps, in their order."""
    _names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[tuple[int, Unit, npt.NDArray[np.uint8]]]:
        """(position of its first item, unit, [items] verdict so far) of one unit after the other."""
        for number, path in enumerate(self.units):
            yield int(self.starts[number]), Unit(path), self.verdict(number)

    def verdict(self, number: int) -> npt.NDArray[np.uint8]:
        """[items] verdicts of a unit: that of the first step that drops an item, else KEPT."""
        begin, end = self.starts[number:number + 2]
        found = np.zeros(end - begin, np.uint8)
        for step in self.steps:
            found = np.where(found == KEPT, step.reason[begin:end], found)
        return found

    def keepers(self, number: int) -> npt.NDArray[np.int64]:
        """[items] of a unit: position of the copy that is kept instead, -1 where there is none."""
        begin, end = self.starts[number:number + 2]
        found = np.full(end - begin, -1, np.int64)
        for step in reversed(self.steps):
            found = np.where(step.reason[begin:end] != KEPT, step.keeper[begin:end], found)
        return found

    def place(self, position: int) -> tuple[int, int]:
        """(unit, number in it) of an item."""
        unit = int(np.searchsorted(self.starts, position, side="right")) - 1
        return unit, position - int(self.starts[unit])

    def provenance(self, position: int) -> bytes:
        """JSON line that says where an item came from."""
        unit, number = self.place(position)
        return Unit(self.units[unit]).blob("provenance").split(b"\n", number + 1)[number]

    def knows(self, name: str) -> bool:
        """Whether a step is finished and taken over."""
        return name in self._names

    def take_over(self, name: str) -> None:
        """Add the verdicts of a step that an earlier process finished; do nothing where none did."""
        if (self.folder / f"{name}.reason").exists():
            self._add(name)

    def _add(self, name: str) -> None:
        self._names.append(name)
        self.steps.append(Verdicts(_reopened(self.folder / f"{name}.reason", np.uint8),
                                   _reopened(self.folder / f"{name}.keeper", np.int64)))

    @contextmanager
    def step(self, name: str) -> Iterator[Verdicts]:
        """The verdicts of a step to be filled, all KEPT. They are published and added to `steps` at the end."""
        reason, keeper = self.folder / f"{name}.reason", self.folder / f"{name}.keeper"
        fresh = Verdicts(_mapped(temporary_name(reason), np.uint8, len(self), 0),
                         _mapped(temporary_name(keeper), np.int64, len(self), -1))
        yield fresh
        for array, path in ((fresh.keeper, keeper), (fresh.reason, reason)):
            if isinstance(array, np.memmap):
                array.flush()
            fsync(temporary_name(path))
            os.replace(temporary_name(path), path)
        fsync(self.folder)
        self._add(name)


def unit_starts(units: Sequence[Path], path: Path) -> I64:
    """[units + 1] position of the first item of each unit. Kept at `path`, so that units are counted once."""
    if not path.exists():
        starts = np.concatenate([[0], np.cumsum([len(Unit(unit)["size"]) for unit in units], dtype=np.int64)])
        with temporary_name(path).open("wb") as file:
            np.save(file, starts.astype(np.int64), allow_pickle=False)
            publish(file, path)
    found: I64 = np.load(path, allow_pickle=False)
    return found


def disk_array(folder: Path, name: str, dtype: Any, size: int) -> npt.NDArray[Any]:
    """An array of zeros in a file that has no name: it is gone with the process."""
    path = folder / f".{name}.array"
    array = _mapped(path, dtype, size, 0)
    path.unlink()
    return array


def _mapped(path: Path, dtype: Any, size: int, value: int) -> npt.NDArray[Any]:
    with path.open("wb") as file:
        file.truncate(size * np.dtype(dtype).itemsize)
    if size == 0:
        return np.zeros(0, dtype)
    array = np.memmap(path, dtype, "r+", shape=(size,))
    if value:
        array[:] = value
    return array


def _reopened(path: Path, dtype: Any) -> npt.NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
