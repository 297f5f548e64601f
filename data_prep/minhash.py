"""MinHash over word shingles: band hashes that near copies share, and the true Jaccard similarity.

Two texts whose sets of shingles have Jaccard similarity s agree in a row of the signature with probability s, and in
at least one of b bands of r rows with 1 - (1 - s^r)^b. A row is the smallest of a_k * h modulo 2^64 over the hashes h
of the shingles, a_k odd: hashes that are mixed well already need no modulus of a prime.
"""

from __future__ import annotations

import functools

import numpy as np

from data_prep.words import I64, U64, mix, ngram_hashes, word_hashes

SHINGLE_WORDS = 5
BLOCK_SHINGLES = 1 << 15
"""Shingles worked on at once: 256 KB, which stay in the cache for all rows."""


@functools.cache
def _multipliers(count: int) -> U64:
    """[count] odd numbers."""
    return mix(np.arange(1, count + 1, dtype=np.uint64)) | np.uint64(1)


def shingle_sets(texts: list[str]) -> tuple[U64, I64]:
    """([m] hashes of the shingles of all texts, sorted and distinct within each; [texts + 1] bounds)."""
    shingles, bounds = ngram_hashes(*word_hashes(texts), SHINGLE_WORDS)
    sets = [np.unique(shingles[bounds[i]:bounds[i + 1]]) for i in range(len(texts))]
    return np.concatenate([np.zeros(0, np.uint64), *sets]), np.cumsum([0, *map(len, sets)])


def signatures(shingles: U64, bounds: I64, rows: int) -> U64:
    """[texts, rows] MinHash signatures of texts with these shingles. A text without any has the largest number."""
    lengths = np.diff(bounds)
    found = np.full((len(lengths), rows), np.iinfo(np.uint64).max, np.uint64)
    texts = np.flatnonzero(lengths)
    first = 0
    while first < len(texts):
        last = int(np.searchsorted(bounds[texts + 1], bounds[texts[first]] + BLOCK_SHINGLES, side="right"))
        last = max(last, first + 1)
        chosen = texts[first:last]
        start, stop = int(bounds[chosen[0]]), int(bounds[chosen[-1] + 1])
        block = shingles[start:stop]
        begins = bounds[chosen] - start
        scaled = np.empty_like(block)
        for k, factor in enumerate(_multipliers(rows)):
            np.multiply(block, factor, out=scaled)
            found[chosen, k] = np.minimum.reduceat(scaled, begins)
        first = last
    return found


def band_hashes(words: U64, word_bounds: I64, bands: int, rows: int) -> U64:
    """[texts, bands] one hash a band of `rows` rows, of texts with these words (see `word_hashes`).

    Texts without a word have zeros, which stand for none.
    """
    shingles, bounds = ngram_hashes(words, word_bounds, SHINGLE_WORDS)
    signed = signatures(shingles, bounds, bands * rows).reshape(len(bounds) - 1, bands, rows)
    found = np.zeros(signed.shape[:2], np.uint64)
    for row, factor in enumerate(_multipliers(bands * rows + rows)[-rows:]):
        found += signed[:, :, row] * factor
    found = mix(found)
    found[np.diff(bounds) == 0] = 0
    return found


def jaccard(a: U64, b: U64) -> float:
    """Similarity of two sorted arrays of distinct hashes: shared over all; 0 where both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)
