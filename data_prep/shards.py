"""The shard format: plain POSIX tars that stock `webdataset` reads, each with a sidecar index that needs no parsing.

A shard `SPLIT-NNNNNN.tar` holds blocks of tokens of many documents. The members of a block are

    KEY.tokens.npy   <u2 or <u4 [n]   n = block_tokens, except in the last block of the split
    KEY.docs.npy     <i8 [d, 5]       one row a document: start in the block, UTF-8 bytes of the whole document, source,
                                      document hash, flags (bit 0: continues the previous block)
    KEY.prov.jsonl                    line i tells where document i of the block came from

`SPLIT-NNNNNN.idx` beside it is a 128-byte header (`INDEX_HEADER`) and one `INDEX_ROW` a block with the byte offsets of
the three payloads inside the tar, so that a reader maps the tar and takes slices. Both are reproducible byte for byte.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import canonical_json
from data_prep.index import DOCUMENTS, IndexLayout, index_path, read_index
from data_prep.manifest import SplitRecord, shard_name, shard_table, write_table
from data_prep.tar import OpenShard
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import fsync, hash_file

DOC_START, DOC_BYTES, DOC_SOURCE, DOC_HASH, DOC_FLAGS = range(5)
"""Columns of `docs.npy`."""
CONTINUES = 1
"""Flag bit: the document began in an earlier block."""
TARGET_SHARD_BYTES = 64 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest token type: <u2 up to 65,536 ids, else <u4."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the documents of one split, in the order they are pushed, as shards of `folder`.

    Use as a context manager: leaving it writes the last block and the split's table, an error leaves only temporary
    files behind. `record` is set afterwards.
    """

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype[Any], block_tokens: int = 16384,
                 blocks_per_shard: int | None = None) -> None:
        self.folder, self.split = folder, split
        self.blocks_per_shard = blocks_per_shard or max(1, TARGET_SHARD_BYTES // (block_tokens * dtype.itemsize))
        self.record: SplitRecord | None = None
        self._block = np.empty(block_tokens, dtype)
        self._fill = 0
        self._doc_rows: list[tuple[int, int, int, int, int]] = []
        self._prov_lines: list[bytes] = []
        self._blocks = self._tokens = self._docs = self._bytes = 0
        self._shard: OpenShard | None = None
        self._table: list[tuple[int, int, int, int, bytes]] = []

    def push(self, tokens: npt.NDArray[Any], *, utf8_bytes: int, source: int, doc_hash: int,
             provenance: dict[str, Any]) -> None:
        """Append one document.

        Args:
            tokens: [n] ids of the document with its end-of-text token, n >= 1.
            utf8_bytes: length of the whole document's text.
            source: number of the source it came from.
            doc_hash: signed 64-bit hash of the document.
            provenance: JSON object that lets the document be found again.

        Raises:
            ValueError: for an empty document or an id that does not fit the token type.
        """
        limit = int(np.iinfo(self._block.dtype).max)
        if len(tokens) == 0 or int(tokens.max()) > limit:
            raise ValueError(f"a document holds at least one token and ids up to {limit}, found {len(tokens)} tokens")
        line = canonical_json(provenance) + b"\n"
        done, flags = 0, 0
        while done < len(tokens):
            taken = min(len(tokens) - done, len(self._block) - self._fill)
            self._doc_rows.append((self._fill, utf8_bytes, source, doc_hash, flags))
            self._prov_lines.append(line)
            self._block[self._fill:self._fill + taken] = tokens[done:done + taken]
            self._fill += taken
            done += taken
            flags = CONTINUES
            if self._fill == len(self._block):
                self._write_block()
        self._docs += 1
        self._bytes += utf8_bytes

    def _write_block(self) -> None:
        if self._shard is None:
            self._shard = OpenShard(self.folder / shard_name(self.split, len(self._table)), DOCUMENTS,
                                    self._block.itemsize)
        docs = np.array(self._doc_rows, "<i8").reshape(-1, 5)
        key, provenance = f"{self.split}-{self._blocks:012d}", b"".join(self._prov_lines)
        self._shard.add_row({
            "tokens": self._fill, "docs": len(docs), "prov_bytes": len(provenance),
            "tokens_offset": self._shard.add_array(f"{key}.tokens.npy", self._block[:self._fill]),
            "docs_offset": self._shard.add_array(f"{key}.docs.npy", docs),
            "prov_offset": self._shard.add_member(f"{key}.prov.jsonl", provenance)})
        self._blocks += 1
        self._tokens += self._fill
        self._fill = 0
        self._doc_rows.clear()
        self._prov_lines.clear()
        if self._shard.blocks == self.blocks_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        size, digest, tokens = self._shard.close()
        self._table.append((self._tokens - tokens, tokens, size, len(self._table), digest))
        self._shard = None

    def close(self) -> SplitRecord:
        """Write what is left, then the split's table. Returns the split's entry for the manifest."""
        if self._fill:
            self._write_block()
        if self._shard is not None:
            self._finish_shard()
        file_name, table_sha256 = write_table(self.folder, self.split, shard_table(self._table))
        fsync(self.folder)
        self.record = SplitRecord(tokens=self._tokens, docs=self._docs, bytes=self._bytes, table=file_name,
                                  table_sha256=table_sha256)
        return self.record

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


class ShardReader:
    """Blocks of one shard as views of the mapped file; nothing is parsed and nothing copied.

    Opening checks the index (its own hash, the tar's size), never the content of the tar: that is `verify_shard`.

    Raises:
        DataCorruption: where the tar or its index is missing, cut short or not a pair.
    """

    def __init__(self, tar_path: Path, idx_path: Path | None = None, *, random_access: bool = True) -> None:
        self.path = tar_path
        header, self._rows = read_index(idx_path or index_path(tar_path))
        self._token_dtype = np.dtype(f"<u{int(header['token_bytes'])}")
        try:
            with tar_path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataCorruption(f"{tar_path}: shard cannot be read ({error})") from None
        if len(self._map) != int(header["tar_bytes"]):
            raise DataCorruption(f"{tar_path}: {len(self._map)} bytes, its index expects {int(header['tar_bytes'])}")
        if random_access and hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    @property
    def n_blocks(self) -> int:
        """Blocks in this shard."""
        return len(self._rows)

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The index: [n_blocks] `INDEX_ROW`."""
        return self._rows

    @property
    def data(self) -> mmap.mmap:
        """The mapped tar, which `rows` points into. For readers that gather many windows at once."""
        return self._map

    def tokens(self, block: int) -> npt.NDArray[Any]:
        """[n] u2 or u4: ids of a block, a read-only view."""
        row = self._rows[block]
        return np.frombuffer(self._map, self._token_dtype, int(row["tokens"]), int(row["tokens_offset"]))

    def docs(self, block: int) -> npt.NDArray[np.int64]:
        """[d, 5] i8: start, utf8_bytes, source, doc_hash, flags of the documents of a block, a read-only view."""
        row = self._rows[block]
        return np.frombuffer(self._map, "<i8", int(row["docs"]) * 5, int(row["docs_offset"])).reshape(-1, 5)

    def provenance(self, block: int) -> list[dict[str, Any]]:
        """Where each of the d documents of a block came from."""
        start, size = int(self._rows[block]["prov_offset"]), int(self._rows[block]["prov_bytes"])
        return [json.loads(line) for line in self._map[start:start + size].splitlines()]


def verify_shard(path: Path, row: np.void, layout: IndexLayout = DOCUMENTS) -> str | None:
    """Hash the shard at `path` against its row of the split's table; also its index, which has this layout.

    Returns what is wrong in one line that names the file, or None.
    """
    try:
        size = path.stat().st_size
        if size != int(row["bytes"]):
            return f"{path}: {size} bytes, the table says {int(row['bytes'])} (truncated or replaced)"
        digest = hash_file(path)
    except OSError as error:
        return f"{path}: shard cannot be read ({error.strerror})"
    expected = row["sha256"].tobytes()
    if digest != expected.hex():
        return f"{path}: SHA-256 is {digest[:16]}..., the table says {expected.hex()[:16]}... (changed bytes)"
    try:
        header, rows = read_index(index_path(path), layout)
    except DataCorruption as error:
        return str(error)
    if header["tar_sha256"].tobytes() != expected or int(rows[layout.items].sum()) != int(row["tokens"]):
        return f"{index_path(path)}: index of another shard (its tar's SHA-256 or number of {layout.items} differs)"
    return None
