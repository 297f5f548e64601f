"""Windows of a dataset that lies elsewhere. See remote.py for what holds and what is given up."""

from __future__ import annotations

from pathlib import Path

from data_prep.index import index_path, read_index
from data_prep.manifest import MANIFEST, TOKENIZER, Manifest
from data_prep.shards import ShardReader
from pretrain.config.source import DataConfig, RemoteConfig
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import OpenedShard, ShardSource
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import hash_file

_TRIES = 5
"""Another process may drop a shard from the cache between its fetch and its opening."""


class RemoteShardSource(ShardSource):
    """The windows of `ShardSource`, of the same fingerprint, read through a cache."""

    def __init__(self, manifest: Manifest, folder: RemoteFolder, config: RemoteConfig, data: DataConfig) -> None:
        """Raises UserError for a split that is not there or shorter than a window."""
        self._folder = folder
        super().__init__(manifest, config.split, seq_len=data.seq_len, stride=data.stride,
                         document_masking=data.document_masking, verify="off")  # each is hashed when it arrives

    @property
    def _max_open(self) -> int:
        """A mapped shard keeps its place on the disk when it leaves the cache: no more are mapped than it holds."""
        largest = max(1, int(self.split.table["bytes"].max()))
        return max(1, min(super()._max_open, self._folder.max_bytes // largest))

    def _require_size(self, shard: int) -> None:
        """Nothing: what arrives is held to its hash."""

    def _map(self, tar_path: Path) -> OpenedShard:
        """Fetch a shard and its index where they are not in the cache. Raises UserError and DataCorruption."""
        row = self.split.table[self.split.table["name_id"] == int(tar_path.stem.rpartition("-")[2])][0]
        expected = row["sha256"].tobytes()

        def damaged(path: Path) -> str | None:
            digest = hash_file(path)
            return None if digest == expected.hex() else f"SHA-256 {digest[:16]}..., {expected.hex()[:16]}... expected"

        def foreign(path: Path) -> str | None:
            try:
                header, _ = read_index(path, self.manifest.layout)
            except DataCorruption as error:
                return str(error)
            return None if header["tar_sha256"].tobytes() == expected else "it is the index of another shard"
        for attempt in range(_TRIES):
            self._folder.fetch(tar_path.name, damaged)
            self._folder.fetch(index_path(tar_path).name, foreign)
            try:
                opened = OpenedShard.of(ShardReader(tar_path), self._dtype)
            except DataCorruption:
                if attempt == _TRIES - 1 or (tar_path.exists() and index_path(tar_path).exists()):
                    raise
                continue
            self._folder.make_room(keep={tar_path.name})
            return opened
        raise AssertionError("the last attempt returns or raises")


def open_remote(config: RemoteConfig, data: DataConfig) -> RemoteShardSource:
    """Fetch manifest, tables and tokenizer of a dataset, hold them to their hashes, and open it as windows.

    Raises UserError where there is no dataset or split, DataCorruption naming what arrives damaged.
    """
    folder = RemoteFolder(config.url, Path(config.cache), config.cache_bytes)
    folder.fetch(MANIFEST)
    manifest = Manifest.read(folder.cache)
    if manifest.tokenizer_sha256 is not None:
        folder.fetch(TOKENIZER)
    for record in manifest.splits.values():
        folder.fetch(record.table)
    problems = manifest.problems(shards=False)
    if problems:
        raise DataCorruption(f"{problems[0]}; where the dataset was replaced, empty {folder.cache}")
    return RemoteShardSource(manifest, folder, config, data)
