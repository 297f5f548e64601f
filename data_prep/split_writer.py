"""What writers of a split share: shards that are opened, ended and listed in the split's table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from data_prep.index import IndexLayout, index_path, read_index
from data_prep.manifest import SplitRecord, shard_name, shard_table, write_table
from data_prep.tar import OpenShard
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import fsync

TARGET_SHARD_BYTES = 64 << 20


class SplitWriter(ABC):
    """Base of the writers of one split: its shards in `folder`, in the order things are pushed.

    Use as a context manager: leaving it writes the last block and the split's table, an error leaves only temporary
    files behind. `record` is set afterwards.
    """

    layout: ClassVar[IndexLayout]

    def __init__(self, folder: Path, split: str, token_bytes: int) -> None:
        self.folder, self.split, self.token_bytes = folder, split, token_bytes
        self.record: SplitRecord | None = None
        self._tokens = self._docs = self._bytes = 0
        self._blocks = self._items = 0
        """Written so far; an item is what addresses are made of, a token or a pair."""
        self._passed_over = 0
        """Items that are pushed again and stand in published shards already."""
        self._shard: OpenShard | None = None
        self._table: list[tuple[int, int, int, int, bytes]] = []

    def resume(self) -> None:
        """Take over what an interrupted writer of the same things published: as much as it holds is passed over.

        Everything is pushed again from the start, so that counts are of the whole.
        """
        while True:
            path = self.folder / shard_name(self.split, len(self._table))
            try:
                header, rows = read_index(index_path(path), self.layout)
                if path.stat().st_size != int(header["tar_bytes"]):
                    return
            except (DataCorruption, FileNotFoundError):
                return
            items = int(rows[self.layout.items].sum())
            self._table.append((self._items, items, int(header["tar_bytes"]), len(self._table),
                                header["tar_sha256"].tobytes()))
            self._items += items
            self._blocks += len(rows)
            self._passed_over += items

    @abstractmethod
    def _write_block(self) -> None:
        """Write what is collected, which is not nothing, as one block: members of `_open_shard`, then `_end_block`."""

    @property
    @abstractmethod
    def _collected(self) -> bool:
        """Whether anything waits to be written."""

    def _open_shard(self) -> OpenShard:
        """The shard that the next block goes to."""
        if self._shard is None:
            self._shard = OpenShard(self.folder / shard_name(self.split, len(self._table)), self.layout,
                                    self.token_bytes)
        return self._shard

    def _end_block(self, row: dict[str, int]) -> None:
        """Enter a block into the index of its shard."""
        self._open_shard().add_row(row)
        self._blocks += 1
        self._items += row[self.layout.items]

    def _finish_shard(self) -> None:
        size, digest, items = self._open_shard().close()
        self._table.append((self._items - items, items, size, len(self._table), digest))
        self._shard = None

    def close(self) -> SplitRecord:
        """Write what is left, then the split's table. Returns the split's entry for the manifest."""
        if self._collected:
            self._write_block()
        if self._shard is not None:
            self._finish_shard()
        file_name, table_sha256 = write_table(self.folder, self.split, shard_table(self._table))
        fsync(self.folder)
        self.record = SplitRecord(tokens=self._tokens, docs=self._docs, bytes=self._bytes, table=file_name,
                                  table_sha256=table_sha256)
        return self.record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()
