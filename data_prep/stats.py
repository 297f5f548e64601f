"""Reading a prepared dataset back: its documents and its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.manifest import Manifest, Split
from data_prep.pairs import PairReader
from data_prep.shards import CONTINUES, DOC_BYTES, DOC_FLAGS, DOC_HASH, DOC_SOURCE, DOC_START, ShardReader

HISTOGRAM_BINS = 33


@dataclass(slots=True)
class StoredDocument:
    """A document as the shards hold it."""

    position: int
    """Number of the document in its split."""
    tokens: npt.NDArray[Any]
    """[n] ids, the end-of-text token included."""
    utf8_bytes: int
    source: int
    doc_hash: int
    """Signed 64-bit hash of its text."""
    provenance: dict[str, Any]


@dataclass(slots=True)
class SplitStats:
    """Figures of a split; its `documents` are pairs in a dataset of pairs.

    Lengths are in tokens: of documents with the end-of-text token, of pairs those of query and positive together.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    shards: int
    longest: int = 0
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    """[33]: bin i counts documents of 2^i to 2^(i+1)-1 tokens."""
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Source name -> (documents or pairs, UTF-8 bytes)."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token; 0 for an empty split."""
        return self.bytes / max(1, self.tokens)

    @property
    def mean_tokens(self) -> float:
        """Tokens a document; 0 for an empty split."""
        return self.tokens / max(1, self.documents)


def split_stats(manifest: Manifest, name: str) -> SplitStats:
    """Figures of one split; reads the rows of documents, never tokens. Raises DataCorruption."""
    split = manifest.split(name)
    if manifest.kind == "pairs":
        return _pair_stats(split)
    stats = SplitStats(name, split.docs, split.tokens, split.bytes, split.n_shards)
    names = [source["name"] for source in manifest.provenance.get("config", {}).get("sources", [])]
    open_length = 0  # of a document that may go on in the next shard
    for shard in range(split.n_shards):
        lengths, rows = _document_pieces(ShardReader(split.tar_path(shard)))
        starts = np.flatnonzero(rows[:, DOC_FLAGS] & CONTINUES == 0)
        open_length += int(lengths[:starts[0] if len(starts) else None].sum())
        if len(starts):
            whole = np.add.reduceat(lengths, starts)
            _count_lengths(stats, np.append(whole[:-1], open_length))
            open_length = int(whole[-1])
            _count_sources(stats, rows[starts], names)
    _count_lengths(stats, np.array([open_length]))
    return stats


def _pair_stats(split: Split) -> SplitStats:
    """Figures of a split of pairs: lengths are those of queries and positives together."""
    stats = SplitStats(split.name, split.docs, split.tokens, split.bytes, split.n_shards)
    for shard in range(split.n_shards):
        reader = PairReader(split.tar_path(shard))
        for number in range(reader.n_blocks):
            block = reader.block(number)
            _count_lengths(stats, np.diff(block.offsets["q"]) + np.diff(block.offsets["p"]))
            for where in reader.provenance(number):
                label = where.get("source", "unknown")
                pairs, size = stats.by_source.get(label, (0, 0))
                stats.by_source[label] = (pairs + 1, size + int(where.get("bytes", 0)))
    return stats


def _document_pieces(reader: ShardReader) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of all blocks of a shard: ([p] tokens of each piece of a document, [p, 5] its row)."""
    rows = [reader.docs(block) for block in range(reader.n_blocks)]
    ends = [np.append(docs[1:, DOC_START], int(reader.rows[block]["tokens"])) for block, docs in enumerate(rows)]
    pieces = np.concatenate(rows)
    return np.concatenate(ends) - pieces[:, DOC_START], pieces


def _count_lengths(stats: SplitStats, lengths: npt.NDArray[np.int64]) -> None:
    """Add documents of these lengths; 0 stands for no document."""
    stats.longest = max(stats.longest, int(lengths.max()))
    stats.histogram += np.bincount(np.log2(lengths[lengths > 0]).astype(np.int64), minlength=HISTOGRAM_BINS)


def _count_sources(stats: SplitStats, rows: npt.NDArray[np.int64], names: list[str]) -> None:
    """Add documents ([d, 5] rows) to the figures of their sources."""
    for number in np.unique(rows[:, DOC_SOURCE]):
        sizes = rows[rows[:, DOC_SOURCE] == number, DOC_BYTES]
        label = names[number] if number < len(names) else str(number)
        documents, size = stats.by_source.get(label, (0, 0))
        stats.by_source[label] = (documents + len(sizes), size + int(sizes.sum()))


def stored_documents(split: Split, offset: int = 0) -> Iterator[StoredDocument]:
    """The documents of a split from number `offset` on, in order. Whole shards before it are passed over by their rows.

    Raises DataCorruption where a shard or its index cannot be read.
    """
    for position, shard, at in _starts(split, offset):
        for document in shard_documents(split, shard, at):
            document.position += position
            yield document


def _starts(split: Split, offset: int) -> Iterator[tuple[int, int, int]]:
    """(number of the first document that begins in a shard, shard, how many of those to pass over)."""
    position = 0
    for shard in range(split.n_shards):
        reader = ShardReader(split.tar_path(shard))
        fresh = sum(int((reader.docs(b)[:, DOC_FLAGS] & CONTINUES == 0).sum()) for b in range(reader.n_blocks))
        if position + fresh > offset:
            yield position, shard, max(0, offset - position)
        position += fresh


def shard_documents(split: Split, shard: int, offset: int = 0) -> Iterator[StoredDocument]:
    """The documents that begin in a shard, whole, from number `offset` of them on; positions count from its first.

    The last one may go on in the shards after it. Raises DataCorruption where one cannot be read.
    """
    position = -1
    current: StoredDocument | None = None
    for number in range(shard, split.n_shards):
        reader = ShardReader(split.tar_path(number), random_access=False)
        for block in range(reader.n_blocks):
            docs = reader.docs(block)
            fresh = docs[:, DOC_FLAGS] & CONTINUES == 0
            if number > shard and fresh.any() and current is None:
                return
            if current is None and position + int(fresh.sum()) < offset:
                position += int(fresh.sum())
                continue
            tokens, provenance = reader.tokens(block), reader.provenance(block)
            for row, end, where in zip(docs, np.append(docs[1:, DOC_START], len(tokens)), provenance, strict=True):
                piece = tokens[row[DOC_START]:end]
                if row[DOC_FLAGS] & CONTINUES:
                    if current is not None:
                        current.tokens = np.concatenate([current.tokens, piece])
                    continue
                if current is not None:
                    yield current
                    current = None
                if number > shard:
                    return
                position += 1
                if position >= offset:
                    current = StoredDocument(position, piece, int(row[DOC_BYTES]), int(row[DOC_SOURCE]),
                                             int(row[DOC_HASH]), where)
    if current is not None:
        yield current
