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

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import canonical_json
from data_prep.index import PAIRS
from data_prep.manifest import Split
from data_prep.mapped import MappedShard
from data_prep.split_writer import TARGET_SHARD_BYTES, SplitWriter

SIDES = ("q", "p", "n")
_BLOCKS_AT_HAND = 256
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
    provenance: dict[str, Any] | bytes = field(default_factory=dict)
    """JSON object, or its canonical text."""


class PairWriter(SplitWriter):
    """Writes the pairs of one split, in the order they are pushed, as shards of `folder`."""

    layout = PAIRS

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype[Any], block_pairs: int = 1024,
                 blocks_per_shard: int | None = None) -> None:
        """Shards end after `blocks_per_shard` blocks; None: with the block that reaches about 64 MB."""
        super().__init__(folder, split, dtype.itemsize)
        self.dtype, self.block_pairs, self.blocks_per_shard = dtype, block_pairs, blocks_per_shard
        self._block: list[TokenPair] = []

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
        self._docs += 1
        self._bytes += utf8_bytes
        if self._passed_over:
            self._passed_over -= 1
            return
        self._block.append(pair)
        if len(self._block) == self.block_pairs:
            self._write_block()

    @property
    def _collected(self) -> bool:
        return bool(self._block)

    def _write_block(self) -> None:
        shard, block, key = self._open_shard(), self._block, f"{self.split}-{self._blocks:012d}"
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
        provenance = b"".join(_line(pair.provenance) for pair in block)
        row["prov_bytes"] = len(provenance)
        row["prov_offset"] = shard.add_member(f"{key}.prov.jsonl", provenance)
        self._end_block(row)
        self._block = []
        full = (row["prov_offset"] >= TARGET_SHARD_BYTES if self.blocks_per_shard is None
                else shard.blocks == self.blocks_per_shard)
        if full:
            self._finish_shard()


def _line(provenance: dict[str, Any] | bytes) -> bytes:
    return (provenance if isinstance(provenance, bytes) else canonical_json(provenance)) + b"\n"


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


class PairReader(MappedShard):
    """Blocks of one shard of pairs as views of the mapped file."""

    layout = PAIRS

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


def stored_pairs(split: Split, offset: int = 0) -> Iterator[TokenPair]:
    """The pairs of a split from number `offset` on, in order. Raises DataCorruption."""
    firsts = split.table["first_token"].astype(np.int64)
    for shard in range(max(0, int(np.searchsorted(firsts, offset, side="right")) - 1), split.n_shards):
        yield from shard_pairs(split, shard, max(0, offset - int(firsts[shard])))


def shard_pairs(split: Split, shard: int, offset: int = 0) -> Iterator[TokenPair]:
    """The pairs of a shard from its number `offset` on, in order. Raises DataCorruption."""
    reader = PairReader(split.tar_path(shard))
    for number in range(offset // split.block_pairs, reader.n_blocks):
        block, provenance = reader.block(number), reader.provenance(number)
        for i in range(max(0, offset - number * split.block_pairs), len(block.ids)):
            yield _pair(block, provenance, i)


def drawn_pairs(split: Split, seed: int = 0) -> Iterator[TokenPair]:
    """All pairs of a split, each once, in an order that depends on `seed` and their number. Raises DataCorruption."""
    firsts = split.table["first_token"].astype(np.int64)
    readers: dict[int, PairReader] = {}

    @functools.lru_cache(_BLOCKS_AT_HAND)
    def block_of(shard: int, number: int) -> tuple[PairBlock, Sequence[Any]]:
        reader = readers.setdefault(shard, PairReader(split.tar_path(shard)))
        return reader.block(number), reader.provenance(number)

    for pair in np.random.default_rng(seed).permutation(split.docs).tolist():
        shard = int(np.searchsorted(firsts, pair, side="right")) - 1
        number, i = divmod(pair - int(firsts[shard]), split.block_pairs)
        yield _pair(*block_of(shard, number), i)


def _pair(block: PairBlock, provenance: Sequence[Any], i: int) -> TokenPair:
    first, stop = block.n_offsets[i:i + 2].tolist()
    return TokenPair(
        query=block.text("q", i), positive=block.text("p", i),
        negatives=[block.text("n", j) for j in range(first, stop)],
        query_id=int(block.ids[i, 0]), positive_id=int(block.ids[i, 1]),
        negative_ids=block.n_ids[first:stop].tolist(), provenance=provenance[i],
        scores=[None if math.isnan(score) else score for score in block.scores[first:stop].tolist()])
