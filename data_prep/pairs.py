"""Shards of pairs: a query, a passage that answers it and any number of passages that do not, as ragged arrays.

The container is that of shards.py: plain tars, a sidecar index, a table a split. A block holds `block_pairs` pairs,
except the last of a split, so that the address of a pair is arithmetic. Its members, with sides q (queries),
p (positives) and n (negatives of all pairs, one after the other), are

    KEY.SIDE.tokens.npy    <u2 or <u4, ids of all texts of the side, without the tokenizer's special tokens
    KEY.SIDE.offsets.npy   <i8 [texts + 1], where each text begins and ends in them
    KEY.ids.npy            <u8 [pairs, 2], ids of query and positive
    KEY.n_ids.npy          <u8 [negatives], ids of the negatives
    KEY.n_offsets.npy      <i8 [pairs + 1], where the negatives of each pair begin and end
    KEY.scores.npy         <f4 [negatives], the source's score of each negative, NaN where it gives none
    KEY.prov.jsonl         line i tells where pair i came from
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import canonical_json
from data_prep.index import PAIRS, index_path, read_index
from data_prep.manifest import Split, SplitRecord, shard_name, shard_table, write_table
from data_prep.tar import OpenShard
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import fsync

SIDES = ("q", "p", "n")
TARGET_SHARD_BYTES = 64 << 20
Ids = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One pair as the shards hold it. Ids of texts are unsigned 64-bit numbers."""

    query: Ids
    positive: Ids
    negatives: Sequence[Ids]
    query_id: int
    positive_id: int
    negative_ids: Sequence[int]
    scores: Sequence[float | None]
    """One for each negative."""
    provenance: dict[str, Any] = field(default_factory=dict)


class PairWriter:
    """Writes the pairs of one split, in the order they are pushed, as shards of `folder`.

    Use as a context manager: leaving it writes the last block and the split's table, an error leaves only temporary
    files behind. `record` is set afterwards.
    """

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype[Any], block_pairs: int = 1024,
                 blocks_per_shard: int | None = None) -> None:
        """Shards end after `blocks_per_shard` blocks; None: with the block that reaches about 64 MB."""
        self.folder, self.split, self.dtype = folder, split, dtype
        self.block_pairs, self.blocks_per_shard = block_pairs, blocks_per_shard
        self.record: SplitRecord | None = None
        self._block: list[TokenPair] = []
        self._blocks = self._pairs = self._tokens = self._bytes = 0
        self._shard: OpenShard | None = None
        self._table: list[tuple[int, int, int, int, bytes]] = []

    def push(self, pair: TokenPair, utf8_bytes: int) -> None:
        """Append one pair whose texts have `utf8_bytes` together.

        Raises ValueError for a text without tokens, an id that does not fit the token type, and negatives, their ids
        and scores of different number.
        """
        limit = int(np.iinfo(self.dtype).max)
        for text in (pair.query, pair.positive, *pair.negatives):
            if len(text) == 0 or int(text.max()) > limit:
                raise ValueError(f"a text holds at least one token and ids up to {limit}, found {len(text)} tokens")
            self._tokens += len(text)
        if not len(pair.negatives) == len(pair.negative_ids) == len(pair.scores):
            raise ValueError(f"{len(pair.negatives)} negatives have {len(pair.negative_ids)} ids and "
                             f"{len(pair.scores)} scores")
        self._block.append(pair)
        self._pairs += 1
        self._bytes += utf8_bytes
        if len(self._block) == self.block_pairs:
            self._write_block()

    def _write_block(self) -> None:
        if self._shard is None:
            self._shard = OpenShard(self.folder / shard_name(self.split, len(self._table)), PAIRS, self.dtype.itemsize)
        shard, block, key = self._shard, self._block, f"{self.split}-{self._blocks:012d}"
        negatives = sum(len(pair.negatives) for pair in block)
        row = {"pairs": len(block), "negatives": negatives}
        sides = ([pair.query for pair in block], [pair.positive for pair in block],
                 [text for pair in block for text in pair.negatives])
        for side, texts in zip(SIDES, sides, strict=True):
            tokens = np.concatenate([np.empty(0, self.dtype), *texts]).astype(self.dtype)
            row[f"{side}_tokens"] = len(tokens)
            row[f"{side}_tokens_offset"] = shard.add_array(f"{key}.{side}.tokens.npy", tokens)
            row[f"{side}_starts_offset"] = shard.add_array(f"{key}.{side}.offsets.npy", _offsets(map(len, texts)))
        scores = [math.nan if score is None else score for pair in block for score in pair.scores]
        for name, array in {
                "ids": np.array([(pair.query_id, pair.positive_id) for pair in block], "<u8"),
                "n_ids": np.array([number for pair in block for number in pair.negative_ids], "<u8"),
                "n_offsets": _offsets(len(pair.negatives) for pair in block),
                "scores": np.array(scores, "<f4")}.items():
            row[f"{name}_offset"] = shard.add_array(f"{key}.{name}.npy", array)
        provenance = b"".join(canonical_json(pair.provenance) + b"\n" for pair in block)
        row["prov_bytes"] = len(provenance)
        row["prov_offset"] = shard.add_member(f"{key}.prov.jsonl", provenance)
        shard.add_row(row)
        self._blocks += 1
        self._block = []
        full = (row["prov_offset"] >= TARGET_SHARD_BYTES if self.blocks_per_shard is None
                else shard.blocks == self.blocks_per_shard)
        if full:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        size, digest, pairs = self._shard.close()
        self._table.append((self._pairs - pairs, pairs, size, len(self._table), digest))
        self._shard = None

    def close(self) -> SplitRecord:
        """Write what is left, then the split's table. Returns the split's entry for the manifest."""
        if self._block:
            self._write_block()
        if self._shard is not None:
            self._finish_shard()
        file_name, table_sha256 = write_table(self.folder, self.split, shard_table(self._table))
        fsync(self.folder)
        self.record = SplitRecord(tokens=self._tokens, docs=self._pairs, bytes=self._bytes, table=file_name,
                                  table_sha256=table_sha256)
        return self.record

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


def _offsets(lengths: Any) -> npt.NDArray[np.int64]:
    """[n + 1] i8: 0 and the running sum."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype("<i8")


@dataclass(frozen=True, slots=True)
class PairBlock:
    """The arrays of one block, views of the mapped tar."""

    tokens: dict[str, Ids]
    """By side: ids of all its texts."""
    offsets: dict[str, npt.NDArray[np.int64]]
    """By side: [texts + 1]."""
    ids: npt.NDArray[np.uint64]
    """[pairs, 2]: query, positive."""
    n_ids: npt.NDArray[np.uint64]
    n_offsets: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def text(self, side: str, number: int) -> Ids:
        """Ids of one text of a side."""
        offsets = self.offsets[side]
        return self.tokens[side][offsets[number]:offsets[number + 1]]


class PairReader:
    """Blocks of one shard of pairs as views of the mapped file.

    Opening checks the index, never the content of the tar: that is `verify_shard`.

    Raises:
        DataCorruption: where the tar or its index is missing, cut short or not a pair.
    """

    def __init__(self, tar_path: Path) -> None:
        self.path = tar_path
        header, self._rows = read_index(index_path(tar_path), PAIRS)
        self._token_dtype = np.dtype(f"<u{int(header['token_bytes'])}")
        try:
            with tar_path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataCorruption(f"{tar_path}: shard cannot be read ({error})") from None
        if len(self._map) != int(header["tar_bytes"]):
            raise DataCorruption(f"{tar_path}: {len(self._map)} bytes, its index expects {int(header['tar_bytes'])}")
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    @property
    def n_blocks(self) -> int:
        """Blocks in this shard."""
        return len(self._rows)

    def block(self, number: int) -> PairBlock:
        """The arrays of a block, nothing copied."""
        row = {name: int(self._rows[number][name]) for name in self._rows.dtype.names or ()}
        pairs, negatives = row["pairs"], row["negatives"]
        texts = {"q": pairs, "p": pairs, "n": negatives}

        def view(dtype: Any, count: int, name: str) -> npt.NDArray[Any]:
            return np.frombuffer(self._map, dtype, count, row[f"{name}_offset"])
        return PairBlock(
            tokens={side: view(self._token_dtype, row[f"{side}_tokens"], f"{side}_tokens") for side in SIDES},
            offsets={side: view("<i8", texts[side] + 1, f"{side}_starts") for side in SIDES},
            ids=view("<u8", 2 * pairs, "ids").reshape(-1, 2), n_ids=view("<u8", negatives, "n_ids"),
            n_offsets=view("<i8", pairs + 1, "n_offsets"), scores=view("<f4", negatives, "scores"))

    def provenance(self, number: int) -> list[dict[str, Any]]:
        """Where each pair of a block came from."""
        start, size = int(self._rows[number]["prov_offset"]), int(self._rows[number]["prov_bytes"])
        return [json.loads(line) for line in self._map[start:start + size].splitlines()]


def stored_pairs(split: Split, offset: int = 0) -> Iterator[TokenPair]:
    """The pairs of a split from number `offset` on, in order. Raises DataCorruption."""
    firsts = split.table["first_token"].astype(np.int64)
    start = max(0, int(np.searchsorted(firsts, offset, side="right")) - 1)
    for shard in range(start, split.n_shards):
        reader = PairReader(split.tar_path(shard))
        skip = max(0, offset - int(firsts[shard]))
        for number in range(skip // split.block_pairs, reader.n_blocks):
            block, provenance = reader.block(number), reader.provenance(number)
            for i in range(max(0, skip - number * split.block_pairs), len(block.ids)):
                first, stop = block.n_offsets[i:i + 2].tolist()
                yield TokenPair(
                    query=block.text("q", i), positive=block.text("p", i),
                    negatives=[block.text("n", j) for j in range(first, stop)],
                    query_id=int(block.ids[i, 0]), positive_id=int(block.ids[i, 1]),
                    negative_ids=block.n_ids[first:stop].tolist(), provenance=provenance[i],
                    scores=[None if math.isnan(score) else score for score in block.scores[first:stop].tolist()])
