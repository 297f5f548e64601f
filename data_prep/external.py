"""Grouping of records by key on the disk, in fixed memory: the one way in which preparation compares everything with
everything.

Records are written to partitions by the top bits of their key and sorted one partition after the other. Groups come in
ascending order of keys, the records of a group in the order they were added, however many partitions there are: memory
decides about speed and never about a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

_BUFFER_BYTES = 1 << 22
_SORTING = 4
"""Times the size of a partition that sorting it takes."""
MAX_PARTITIONS = 1 << 9


class Grouper:
    """Records (key of 128 bits, position, value) grouped by key. Use as a context manager: it leaves no file behind."""

    RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8"), ("value", "<i4")])

    def __init__(self, folder: Path, name: str, expected: int, memory: int) -> None:
        """`expected` records at most; sorting and buffers take about `memory` bytes."""
        wanted = expected * self.RECORD.itemsize * _SORTING // max(1, memory)
        self._bits = min(MAX_PARTITIONS.bit_length() - 1, int(wanted).bit_length())
        self._paths = [folder / f".{name}-{i}.records" for i in range(1 << self._bits)]
        self._files = [path.open("wb", buffering=0) for path in self._paths]
        self._buffer: list[npt.NDArray[Any]] = []
        self._buffered = 0
        self._limit = max(_BUFFER_BYTES, min(memory // 8, len(self._paths) << 16))

    def add(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64] | int, position: npt.NDArray[np.int64],
            value: npt.NDArray[Any] | int = 0) -> None:
        """Add records [n]."""
        records = np.empty(len(high), self.RECORD)
        records["high"], records["low"], records["position"], records["value"] = high, low, position, value
        self._buffer.append(records)
        self._buffered += records.nbytes
        if self._buffered >= self._limit:
            self._flush()

    def _flush(self) -> None:
        records = np.concatenate(self._buffer) if self._buffer else np.empty(0, self.RECORD)
        self._buffer, self._buffered = [], 0
        if self._bits == 0:
            self._files[0].write(records.tobytes())
            return
        partition = (records["high"] >> np.uint64(64 - self._bits)).astype(np.int64)
        order = np.argsort(partition, kind="stable")
        ends = np.searchsorted(partition[order], np.arange(len(self._files)), side="right")
        begin = 0
        for file, end in zip(self._files, ends.tolist(), strict=True):
            if end > begin:
                file.write(records[order[begin:end]].tobytes())
            begin = end

    def groups(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """([n] records, [groups + 1] bounds) of one partition after the other; groups of one record are left out."""
        self._flush()
        for file in self._files:
            file.close()
        for path in self._paths:
            records = np.fromfile(path, self.RECORD)
            path.unlink()
            order = np.lexsort((records["low"], records["high"]))
            records = records[order]
            if len(records) == 0:
                continue
            fresh = np.ones(len(records), np.bool_)
            fresh[1:] = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
            starts = np.flatnonzero(fresh)
            sizes = np.diff(starts, append=len(records))
            kept = np.repeat(sizes > 1, sizes)
            yield records[kept], np.concatenate([[0], np.cumsum(sizes[sizes > 1])])

    def __enter__(self) -> Grouper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)
