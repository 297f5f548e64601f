"""An exact index of the n-grams of evaluation items, and what of them a corpus holds.

The index is built from the evaluation side, so its memory is that of the evaluation sets; a corpus of any size streams
past it. An n-gram is found by a 64-bit hash behind a bitmap and confirmed by a second, independent one: a false hit
takes 2^128. Items of fewer than n words are looked for as whole texts.

Counting is by distinct documents. n-grams that stand in many of them (`boilerplate`: licences, headers) say nothing
about a leak and are told apart; a whole text always counts. All results are independent of the order of documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.words import I64, U64, check_hashes, ngram_hashes

MAX_FILTER_BITS = 30
_FIELDS = ("hashes", "checks", "grams", "bounds", "lengths")


@dataclass(frozen=True, slots=True)
class Hits:
    """n-grams of the index in a batch of texts, in the order of texts and positions."""

    texts: I64
    """[h] number of the text in the batch."""
    positions: I64
    """[h] number of the n-gram in the text."""
    grams: I64
    """[h] number of the n-gram in the index."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of an evaluation item was found."""

    item: int
    coverage: float
    """Share of the item's words inside of matched n-grams."""
    run: int
    """Words of the longest stretch of the item all of whose n-grams matched."""
    first: int
    """First word of that stretch."""


class NgramIndex:
    """n-grams of evaluation items, numbered 0, 1, ... in both directions."""

    def __init__(self, n: int, hashes: U64, checks: U64, grams: I64, bounds: I64, lengths: I64) -> None:
        """`hashes`, `checks` [g] of the distinct n-grams, sorted; `grams` [w] number of each item's n-grams, item after
        item with `bounds` [items + 1]; `lengths` [items] in words. Use `build` or `load`."""
        self.n, self.hashes, self.checks, self.grams, self.bounds, self.lengths = (
            n, hashes, checks, grams, bounds, lengths)
        self._bits = min(MAX_FILTER_BITS, max(16, len(hashes).bit_length() + 4))
        self._filter = np.zeros(1 << (self._bits - 3), np.uint8)
        places = hashes >> np.uint64(64 - self._bits)
        np.bitwise_or.at(self._filter, (places >> np.uint64(3)).astype(np.int64),
                         (np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)))
        self._order: I64 | None = None

    @classmethod
    def build(cls, n: int, batches: Iterable[tuple[U64, I64]]) -> NgramIndex:
        """Index of items given as batches of ([m] word hashes, [items + 1] bounds)."""
        hashes, checks, counts, lengths = [], [], [], []
        for words, bounds in batches:
            found, gram_bounds = ngram_hashes(words, bounds, n)
            texts, positions = _places(gram_bounds)
            hashes.append(found)
            checks.append(check_hashes(words, bounds, n, texts, positions))
            counts.append(np.diff(gram_bounds))
            lengths.append(np.diff(bounds))
        hashed, checked = _join_u64(hashes), _join_u64(checks)
        order = np.lexsort((checked, hashed))
        hashed, checked = hashed[order], checked[order]
        fresh = np.ones(len(order), np.bool_)
        fresh[1:] = (hashed[1:] != hashed[:-1]) | (checked[1:] != checked[:-1])
        grams = np.empty(len(order), np.int64)
        grams[order] = np.cumsum(fresh) - 1
        return cls(n, hashed[fresh], checked[fresh], grams, np.concatenate([[0], np.cumsum(_join(counts))]),
                   _join(lengths))

    def save(self, folder: Path) -> None:
        """Write the arrays, which many processes can then share through `load`."""
        folder.mkdir(exist_ok=True)
        for name in _FIELDS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        np.save(folder / "n.npy", np.array(self.n))

    @classmethod
    def load(cls, folder: Path) -> NgramIndex:
        """Map a saved index."""
        arrays: list[Any] = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FIELDS]
        return cls(int(np.load(folder / "n.npy")), *arrays)

    @property
    def n_items(self) -> int:
        """Evaluation items, those without a word included."""
        return len(self.lengths)

    @property
    def n_grams(self) -> int:
        """Distinct n-grams."""
        return len(self.hashes)

    @property
    def whole_texts(self) -> npt.NDArray[np.bool_]:
        """[g] whether an n-gram is a whole text of fewer than n words."""
        found = np.zeros(self.n_grams, np.bool_)
        short = np.flatnonzero((self.lengths > 0) & (self.lengths < self.n))
        found[self.grams[self.bounds[short]]] = True
        return found

    def probe(self, words: U64, bounds: I64) -> Hits:
        """The n-grams of a batch of texts ([m] word hashes, [texts + 1] bounds) that are in the index."""
        hashes, gram_bounds = ngram_hashes(words, bounds, self.n)
        places = hashes >> np.uint64(64 - self._bits)
        bits = self._filter[(places >> np.uint64(3)).astype(np.int64)] >> (places & np.uint64(7)).astype(np.uint8)
        at = np.flatnonzero(bits & np.uint8(1))
        first = np.searchsorted(self.hashes, hashes[at])
        inside = first < self.n_grams
        inside[inside] = self.hashes[first[inside]] == hashes[at][inside]
        at, first = at[inside], first[inside]
        texts = np.searchsorted(gram_bounds, at, side="right") - 1
        positions = at - gram_bounds[texts]
        checks = check_hashes(words, bounds, self.n, texts, positions)
        found = self.checks[first] == checks if len(first) else np.zeros(0, np.bool_)
        for i in np.flatnonzero(~found).tolist():  # equal in 64 bits and yet others: as good as never
            gram = int(first[i])
            while gram < self.n_grams and self.hashes[gram] == self.hashes[first[i]] and not found[i]:
                found[i] = self.checks[gram] == checks[i]
                first[i], gram = gram if found[i] else first[i], gram + 1
        return Hits(texts[found], positions[found], first[found])

    def overlaps(self, matched: npt.NDArray[np.bool_], items: I64 | None = None) -> list[Overlap]:
        """Of each item (or of `items` [i]), how much the n-grams of `matched` [g] cover. Items without any: left out.

        """
        found = []
        for item in range(self.n_items) if items is None else items.tolist():
            start, stop = int(self.bounds[item]), int(self.bounds[item + 1])
            at = np.flatnonzero(matched[self.grams[start:stop]])
            if len(at):
                found.append(self._overlap(item, at))
        return found

    def _overlap(self, item: int, at: I64) -> Overlap:
        """Overlap of an item whose n-grams number `at` [k >= 1], ascending, are matched."""
        words = int(self.lengths[item])
        n = min(self.n, words)
        covered = int(np.minimum(np.diff(at, append=at[-1] + n), n).sum())
        breaks = np.flatnonzero(np.diff(at) > 1) + 1
        starts = np.concatenate([[0], breaks])
        lengths = np.diff(np.concatenate([starts, [len(at)]]))
        longest = int(lengths.argmax())
        return Overlap(item, covered / words, int(lengths[longest]) + n - 1, int(at[starts[longest]]))

    def grams_of(self, item: int) -> I64:
        """[k] n-grams of an item, in its order."""
        return self.grams[self.bounds[item]:self.bounds[item + 1]]

    def items_of(self, grams: I64) -> I64:
        """Numbers of the items that hold any of these n-grams, ascending."""
        if self._order is None:
            self._order = np.argsort(self.grams, kind="stable")
            self._sorted_grams = self.grams[self._order]
        order = self._order
        begin = np.searchsorted(self._sorted_grams, grams)
        end = np.searchsorted(self._sorted_grams, grams, side="right")
        places = np.concatenate([np.zeros(0, np.int64), *(order[b:e] for b, e in zip(begin, end, strict=True))])
        return np.unique(np.searchsorted(self.bounds, places, side="right") - 1)

    def judge(self, grams: I64) -> list[Overlap]:
        """Overlap of every item with one text that holds these n-grams."""
        grams = np.unique(grams)
        found = []
        for item in self.items_of(grams).tolist():
            start, stop = int(self.bounds[item]), int(self.bounds[item + 1])
            at = np.flatnonzero(np.isin(self.grams[start:stop], grams))
            found.append(self._overlap(item, at))
        return found


class GramCounts:
    """In how many distinct documents each n-gram of an index stands. Counts of shards are added."""

    def __init__(self, index: NgramIndex) -> None:
        self.counts = np.zeros(index.n_grams, np.uint32)
        self._whole = index.whole_texts

    def add(self, hits: Hits) -> None:
        """Count a batch of whole documents."""
        if len(hits.grams):
            pairs = np.unique(np.stack([hits.texts, hits.grams], axis=1), axis=0)
            np.add.at(self.counts, pairs[:, 1], 1)

    def matched(self, boilerplate: int) -> npt.NDArray[np.bool_]:
        """[g] whether an n-gram was found, but in no more than `boilerplate` documents, or is a whole text."""
        return (self.counts > 0) & ~self.common(boilerplate)

    def common(self, boilerplate: int) -> npt.NDArray[np.bool_]:
        """[g] whether an n-gram was found in more than `boilerplate` documents. Whole texts never are that."""
        return (self.counts > boilerplate) & ~self._whole


class WholeItems:
    """Which items stand whole in one text: all of their n-grams, one after the other, however common these are."""

    def __init__(self, index: NgramIndex) -> None:
        self.found = np.zeros(index.n_items, np.bool_)
        """[items]"""
        self._index, self._sizes = index, np.diff(index.bounds)
        items = np.flatnonzero(self._sizes)
        owner, place = _places(index.bounds)
        shared = np.bincount(index.grams, minlength=1)[index.grams]
        rarest = np.lexsort((shared, owner))[index.bounds[items]]  # of each item, the n-gram that fewest others have
        order = np.argsort(index.grams[rarest], kind="stable")
        self._grams, self._items, self._before = (
            array[order] for array in (index.grams[rarest], items, place[rarest]))

    def add(self, hits: Hits) -> None:
        """Look at a batch of whole texts."""
        begin = np.searchsorted(self._grams, hits.grams)
        counts = np.searchsorted(self._grams, hits.grams, side="right") - begin
        at = np.repeat(np.arange(len(counts)), counts)
        chosen = _ranges(begin, counts)
        items, first = self._items[chosen], at - self._before[chosen]
        last = first + self._sizes[items] - 1
        fits = np.flatnonzero((first >= 0) & (last < len(hits.grams)) & ~self.found[items])
        items, first, last = items[fits], first[fits], last[fits]
        fits = np.flatnonzero((hits.texts[first] == hits.texts[last]) & (
            hits.positions[last] - hits.positions[first] == last - first))
        for item, start in zip(items[fits].tolist(), first[fits].tolist(), strict=True):
            if not self.found[item]:
                own = self._index.grams_of(item)
                self.found[item] = np.array_equal(hits.grams[start:start + len(own)], own)


def _ranges(begin: I64, counts: I64) -> I64:
    """begin[i], begin[i] + 1, ... counts[i] of them for each i."""
    return np.arange(counts.sum()) + np.repeat(begin - np.cumsum(counts) + counts, counts)


def _places(bounds: I64) -> tuple[I64, I64]:
    """Of each element: the number of its text and its place there."""
    counts = np.diff(bounds)
    texts = np.repeat(np.arange(len(counts)), counts)
    return texts, np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)


def _join_u64(arrays: list[U64]) -> U64:
    return np.concatenate([np.zeros(0, np.uint64), *arrays])


def _join(arrays: list[I64]) -> I64:
    return np.concatenate([np.zeros(0, np.int64), *arrays])
