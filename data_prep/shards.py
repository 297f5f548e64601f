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

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import canonical_json
from data_prep.index import DOCUMENTS, IndexLayout, index_path, read_index
from data_prep.mapped import MappedShard
from data_prep.split_writer import TARGET_SHARD_BYTES, SplitWriter
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import hash_file

DOC_START, DOC_BYTES, DOC_SOURCE, DOC_HASH, DOC_FLAGS = range(5)
"""Columns of `docs.npy`."""
CONTINUES = 1
"""Flag bit: the document began in an earlier block."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest token type: <u2 up to 65,536 ids, else <u4."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter(SplitWriter):
    """Writes the documents of one split, in the order they are pushed, as shards of `folder`."""

    layout = DOCUMENTS

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype[Any], block_tokens: int = 16384,
                 blocks_per_shard: int | None = None) -> None:
        super().__init__(folder, split, dtype.itemsize)
        self.blocks_per_shard = blocks_per_shard or max(1, TARGET_SHARD_BYTES // (block_tokens * dtype.itemsize))
        self._block = np.empty(block_tokens, dtype)
        self._fill = 0
        self._doc_rows: list[tuple[int, int, int, int, int]] = []
        self._prov_lines: list[bytes] = []

    def push(self, tokens: npt.NDArray[Any], *, utf8_bytes: int, source: int, doc_hash: int,
             provenance: dict[str, Any] | bytes) -> None:
        """Append one document.

        Args:
            tokens: [n] ids of the document with its end-of-text token, n >= 1.
            utf8_bytes: length of the whole document's text.
            source: number of the source it came from.
            doc_hash: signed 64-bit hash of the document.
            provenance: JSON object that lets the document be found again, or its canonical text.

        Raises:
            ValueError: for an empty document or an id that does not fit the token type.
        """
        limit = int(np.iinfo(self._block.dtype).max)
        if len(tokens) == 0 or int(tokens.max()) > limit:
            raise ValueError(f"a document holds at least one token and ids up to {limit}, found {len(tokens)} tokens")
        line = (provenance if isinstance(provenance, bytes) else canonical_json(provenance)) + b"\n"
        done = min(self._passed_over, len(tokens))
        self._passed_over -= done
        flags = CONTINUES if done else 0
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
        self._tokens += len(tokens)
        self._bytes += utf8_bytes

    @property
    def _collected(self) -> bool:
        return self._fill > 0

    def _write_block(self) -> None:
        shard = self._open_shard()
        docs = np.array(self._doc_rows, "<i8").reshape(-1, 5)
        key, provenance = f"{self.split}-{self._blocks:012d}", b"".join(self._prov_lines)
        self._end_block({
            "tokens": self._fill, "docs": len(docs), "prov_bytes": len(provenance),
            "tokens_offset": shard.add_array(f"{key}.tokens.npy", self._block[:self._fill]),
            "docs_offset": shard.add_array(f"{key}.docs.npy", docs),
            "prov_offset": shard.add_member(f"{key}.prov.jsonl", provenance)})
        self._fill = 0
        self._doc_rows.clear()
        self._prov_lines.clear()
        if shard.blocks == self.blocks_per_shard:
            self._finish_shard()


class ShardReader(MappedShard):
    """Blocks of one shard of documents as views of the mapped file."""

    layout = DOCUMENTS

    def tokens(self, block: int) -> npt.NDArray[Any]:
        """[n] u2 or u4: ids of a block, a read-only view."""
        row = self._rows[block]
        return np.frombuffer(self._map, self._token_dtype, int(row["tokens"]), int(row["tokens_offset"]))

    def docs(self, block: int) -> npt.NDArray[np.int64]:
        """[d, 5] i8: start, utf8_bytes, source, doc_hash, flags of the documents of a block, a read-only view."""
        row = self._rows[block]
        return np.frombuffer(self._map, "<i8", int(row["docs"]) * 5, int(row["docs_offset"])).reshape(-1, 5)


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
