"""What the sources of prepared datasets share: mapped shards opened on use, and how far their bytes are trusted."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.files import size_problem
from data_prep.manifest import LOOKED_AT, Manifest, Split
from data_prep.shards import verify_shard
from pretrain.errors import DataCorruption

MAX_OPEN_SHARDS = 512
"""Mapped shards a process keeps; opening one costs about 0.1 ms."""
FULL_VERIFY_BYTES = 2_000_000_000
"""`verify: auto` hashes everything before the first step up to this size."""
Verify = Literal["full", "touch", "off", "auto"]
Opened = TypeVar("Opened")


class StoredSplit(ABC, Generic[Opened]):
    """Base of the sources that read a split of a prepared dataset. Safe to fork: nothing in it has a file position.

    `Opened` is what a source keeps of a mapped shard; the latest `MAX_OPEN_SHARDS` stay open.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        """Raises UserError for a split that the dataset does not have."""
        self.manifest = manifest
        self.split: Split = manifest.split(split)
        self._n_shards = self.split.n_shards  # asked for once a window
        self._first_item = self.split.table["first_token"].astype(np.int64)
        self._open: OrderedDict[int, Opened] = OrderedDict()
        # Anonymous shared memory: what one loader process has hashed, its siblings need not hash again.
        self._trusted = np.frombuffer(mmap.mmap(-1, max(1, self.split.n_shards)), np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are spawned: mapped files stay behind and are opened again."""
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocab_size

    @property
    def tokenizer_sha256(self) -> str | None:
        """SHA-256 of the tokenizer that gave the ids; None for ids without one."""
        return self.manifest.tokenizer_sha256

    @abstractmethod
    def _map(self, tar_path: Path) -> Opened:
        """Open a shard whose content is trusted."""

    def _trust(self, verify: Verify) -> None:
        """Decide when shards are hashed, and hash them all where that is now. Raises DataCorruption for the first."""
        if verify == "auto":
            verify = "full" if int(self.split.table["bytes"].sum()) <= FULL_VERIFY_BYTES else "touch"
        self._trusted[:] = verify == "off"
        if verify == "full":
            for shard in range(self.split.n_shards):
                self._verify(shard)

    @property
    def _max_open(self) -> int:
        """Shards that stay mapped."""
        return MAX_OPEN_SHARDS

    def _verify(self, shard: int) -> None:
        """Compare a shard with its recorded hash. Raises DataCorruption naming the file."""
        problem = verify_shard(self.split.tar_path(shard), self.split.table[shard], self.manifest.layout)
        if problem:
            raise DataCorruption(problem)
        self._trusted[shard] = True

    def _require_size(self, shard: int) -> None:
        """Raise DataCorruption, naming the file, for a shard of another size than the table says, or none."""
        problem = size_problem(self.split.tar_path(shard), int(self.split.table[shard]["bytes"]))
        if problem:
            raise DataCorruption(problem)

    def _opened(self, shard: int) -> Opened:
        """The mapped shard; hashed first where it has not been yet."""
        opened = self._open.get(shard)
        if opened is None:
            if not self._trusted[shard]:
                self._verify(shard)
            elif self.split.n_shards > LOOKED_AT:  # its file may not have been looked at yet
                self._require_size(shard)
            opened = self._open[shard] = self._map(self.split.tar_path(shard))
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        elif self._n_shards > self._max_open:
            self._open.move_to_end(shard)
        return opened

    @staticmethod
    def _require_ids(sample_ids: NDArray[np.int64], length: int, noun: str) -> None:
        """Raise IndexError for an id outside of [0, length)."""
        if sample_ids.size and (sample_ids.min() < 0 or sample_ids.max() >= length):
            raise IndexError(f"{noun} {sample_ids.min()} to {sample_ids.max()} asked of a source that has {length}")
