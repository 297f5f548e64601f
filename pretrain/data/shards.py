"""Windows of a prepared dataset: any length and stride, cut from the contiguous token stream of a split.

Window i is the seq_len + 1 tokens from i * stride on, across the edges of blocks and shards; what is left at the end
and fills no window is dropped. Every block of a split but the last holds the same number of tokens, so the place of a
window is arithmetic. The shards are mapped into memory with MADV_RANDOM and opened on use, the latest `MAX_OPEN_SHARDS`
stay open.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import canonical_json
from data_prep.manifest import Manifest
from data_prep.shards import CONTINUES, DOC_FLAGS, DOC_START, ShardReader
from pretrain.config.source import DataConfig, ShardsConfig
from pretrain.data.batch import Batch
from pretrain.data.stored import StoredSplit, Verify
from pretrain.errors import UserError

IGNORE_LABEL = -100
DOC_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class OpenedShard:
    """What the inner loop needs of a mapped shard: the whole tar as tokens and as document rows, and where to look."""

    reader: ShardReader
    tokens: NDArray[Any]
    docs: NDArray[np.int64]
    rows: list[list[int]]
    """[blocks][4]: first token, tokens, first number of the document table, documents; in items of the two views."""

    @classmethod
    def of(cls, reader: ShardReader, dtype: np.dtype[Any]) -> OpenedShard:
        """The views of a mapped shard whose tokens have this type."""
        rows = np.stack([reader.rows["tokens_offset"] // dtype.itemsize, reader.rows["tokens"],
                         reader.rows["docs_offset"] // 8, reader.rows["docs"]], axis=1).astype(np.int64)
        # An npy payload in a tar begins at a multiple of 64 bytes, so that items line up in both views.
        return cls(reader, np.frombuffer(reader.data, dtype), np.frombuffer(reader.data, "<i8"), rows.tolist())


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What the windows of a batch take from blocks; a window has one piece for each block it lies in."""

    starts: list[NDArray[np.int64]]
    """Where the documents of the piece's block begin."""
    bounds: list[tuple[int, int, int]]
    """Starts from the first to before the second count; what to add for a position in the batch, row by row."""

    def begins(self) -> NDArray[np.int64]:
        """Positions in the batch, row by row, at which a further document of a window begins, in order."""
        if not self.starts:
            return np.zeros(0, np.int64)
        counts = np.fromiter(map(len, self.starts), np.int64, len(self.starts))
        low, high, shift = np.repeat(np.array(self.bounds, np.int64).T, counts, axis=1)
        starts = np.concatenate(self.starts)
        return (starts + shift)[(starts >= low) & (starts < high)]


class ShardSource(StoredSplit[OpenedShard]):
    """The windows of one split as samples."""

    def __init__(self, manifest: Manifest, split: str, *, seq_len: int, stride: int | None = None,
                 document_masking: bool = True, verify: Verify = "auto") -> None:
        """Open a split of a loaded manifest; `stride` None means seq_len.

        Raises:
            UserError: no such split, or one shorter than a window.
            DataCorruption: with full verification, the first shard whose hash is not the recorded one.
        """
        manifest.require("documents")
        super().__init__(manifest, split)
        self.seq_len, self.stride, self.document_masking = seq_len, stride or seq_len, document_masking
        self._dtype = np.dtype(manifest.dtype)
        if self.split.tokens <= seq_len:
            raise UserError(f'{manifest.folder}: split "{split}" has {self.split.tokens} tokens, a window of '
                            f"data.seq_len {seq_len} needs {seq_len + 1}; prepare more text or lower data.seq_len")
        self._trust(verify)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's fingerprint and the way it is cut into windows."""
        return hashlib.sha256(canonical_json({
            "kind": "shards", "dataset": self.manifest.fingerprint, "split": self.split.name, "seq_len": self.seq_len,
            "stride": self.stride, "document_masking": self.document_masking})).hexdigest()

    def __len__(self) -> int:
        """Windows in the split."""
        return (self.split.tokens - self.seq_len - 1) // self.stride + 1

    def get(self, sample_ids: NDArray[np.int64]) -> Batch:
        """Windows [B] as tensors [B, T].

        input_ids int64; labels int64, the next token, -100 where it belongs to another document (with document
        masking); document_ids int32, 0, 1, 2, ... within the window.

        Raises:
            IndexError: for an id outside of [0, len).
            DataCorruption: for a shard found changed at its first use.
        """
        self._require_ids(sample_ids, len(self), "windows")
        tokens = np.empty((len(sample_ids), self.seq_len + 1), self._dtype)
        first = sample_ids * self.stride
        shards = np.searchsorted(self._first_item, first, side="right") - 1
        blocks, offsets = np.divmod(first - self._first_item[shards], self.split.block_tokens)
        pieces = _Pieces([], [])
        places = zip(shards.tolist(), blocks.tolist(), offsets.tolist(), strict=True)
        for row, (shard, block, offset) in enumerate(places):
            self._read_window(shard, block, offset, row, tokens, pieces)
        begins = pieces.begins()
        labels = tokens[:, 1:].astype(np.int64)
        document_ids = np.zeros((len(sample_ids), self.seq_len), np.int32)
        if len(begins):
            rows, columns = np.divmod(begins, tokens.shape[1])
            if self.document_masking:
                labels[rows, columns - 1] = IGNORE_LABEL  # a window's own first token is no beginning
            inside = columns < self.seq_len
            document_ids[rows[inside], columns[inside]] = 1
            np.cumsum(document_ids, axis=1, out=document_ids)
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), {
            "input_ids": torch.from_numpy(tokens[:, :-1].astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(document_ids)})

    def _read_window(self, shard: int, block: int, offset: int, row: int, tokens: NDArray[Any],
                     pieces: _Pieces) -> None:
        """Fill `tokens[row]` from a place on, and note where its documents may begin.

        This runs once a window and is kept free of everything that a batch can share.
        """
        length = tokens.shape[1]
        filled = 0
        while True:
            opened = self._opened(shard)
            tokens_at, block_tokens, docs_at, docs = opened.rows[block]
            taken = min(length - filled, block_tokens - offset)
            tokens[row, filled:filled + taken] = opened.tokens[tokens_at + offset:tokens_at + offset + taken]
            pieces.starts.append(opened.docs[docs_at + DOC_START:docs_at + docs * DOC_COLUMNS:DOC_COLUMNS])
            whole = filled and not opened.docs[docs_at + DOC_FLAGS] & CONTINUES
            pieces.bounds.append((offset if whole else offset + 1, offset + taken, row * length + filled - offset))
            filled += taken
            if filled == length:
                return
            offset, block = 0, block + 1
            if block == len(opened.rows):
                shard, block = shard + 1, 0

    def _map(self, tar_path: Path) -> OpenedShard:
        return OpenedShard.of(ShardReader(tar_path), self._dtype)

    def provenance(self, sample_id: int) -> list[dict[str, Any]]:
        """Where each document that a window holds tokens of came from, in the order of the window."""
        found: list[dict[str, Any]] = []
        position = sample_id * self.stride
        end = position + self.seq_len
        while position < end:
            shard = self.split.shard_of(position)
            block, offset = divmod(position - int(self._first_item[shard]), self.split.block_tokens)
            reader = self._opened(shard).reader
            docs = reader.docs(block)
            taken = min(end - position, len(reader.tokens(block)) - offset)
            begin, stop = np.searchsorted(docs[:, DOC_START], (offset, offset + taken - 1), side="right").tolist()
            begin -= 1  # the document that holds the token at offset
            if found and docs[begin, DOC_FLAGS] & CONTINUES:
                begin += 1
            found += reader.provenance(block)[begin:stop]
            position += taken
        return found


def open_shards(config: ShardsConfig, data: DataConfig) -> StoredSplit[Any]:
    """Open a dataset folder as windows of `data.seq_len`, or as samples of a packing plan of that length.

    Sizes of all files and hashes of manifest, tables and tokenizer are checked at once, the content of the shards as
    `config.verify` says.

    Raises UserError where there is no dataset, split or plan, DataCorruption naming the first file found wrong.
    """
    from pretrain.data.packed import PackedSource
    manifest = Manifest.load(Path(config.path))
    if config.packing == "best_fit":
        if data.stride is not None or not data.document_masking:
            raise UserError("data.source.packing: samples of a plan hold whole documents; leave data.stride out and "
                            "data.document_masking on")
        return PackedSource(manifest, config.split, seq_len=data.seq_len, verify=config.verify)
    return ShardSource(manifest, config.split, seq_len=data.seq_len, stride=data.stride,
                       document_masking=data.document_masking, verify=config.verify)
