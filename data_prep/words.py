"""Words as 64-bit numbers and n-grams of them: what copies are found by.

A text is put into NFC and lower case. A word is a longest run of letters, digits and marks; everything else only
separates. Scripts that put no spaces between words (Han, Kana, Thai, Lao, Khmer, Burmese) give one word a character.

All hashing is polynomial, modulo 2^64, on whole arrays: a word is sum_i mix(c_i) B^i over its characters, an n-gram
sum_k B^(n-1-k) w_k over its words. Both bases are fixed numbers: the same text has the same hashes everywhere and for
ever (within one version of the Unicode tables, which `unicode_version` names).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

BLOCK_CHARS = 1 << 17
"""Characters hashed at once; the arrays of a block stay in the cache."""
_BASE = 0x9E3779B97F4A7C15 | 1
_NGRAM_BASE = 0xD1342543DE82EF95 | 1
_CHECK_BASE = 0xAF251AF3B0F025B5 | 1
_MASK = (1 << 64) - 1
_SINGLE = ((0x0E01, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
           (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
"""Blocks whose characters are a word each."""
SEPARATOR, INSIDE, SINGLE = 0, 1, 2


def unicode_version() -> str:
    """Version of the tables that say what a letter is."""
    return unicodedata.unidata_version


@functools.cache
def _classes() -> npt.NDArray[np.uint8]:
    """[0x110000] of each code point: SEPARATOR, INSIDE a word or a SINGLE word."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(0x323B0):  # above are only tags, variation selectors and private use
        if unicodedata.category(chr(code))[0] in "LNM":
            table[code] = INSIDE
    for first, last in _SINGLE:
        block = table[first:last + 1]
        block[block == INSIDE] = SINGLE
    return table


@functools.cache
def _powers() -> tuple[U64, U64]:
    """[BLOCK_CHARS] B^i and B^-i modulo 2^64."""
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(BLOCK_CHARS, base, np.uint64)
        factors[0] = 1
        found.append(np.cumprod(factors))
    return found[0], found[1]


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normalised(text: str) -> str:
    """NFC and lower case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


def word_hashes(texts: Sequence[str]) -> tuple[U64, I64]:
    """([n] hashes of the words of all texts, [texts + 1] where the words of each text begin and end)."""
    hashes: list[U64] = []
    counts = np.zeros(len(texts) + 1, np.int64)
    for numbers, points, ends in _blocks(texts):
        found, starts = _hash_block(points)
        hashes.append(found)
        owner = np.searchsorted(ends, starts, side="right")
        np.add.at(counts, 1 + np.asarray(numbers)[owner], 1)
    return np.concatenate([np.zeros(0, np.uint64), *hashes]), np.cumsum(counts)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], npt.NDArray[np.uint32], list[int]]]:
    """(numbers of the texts in a block, code points of the block, where each text ends in it).

    Texts are parted by a separator. One longer than a block is cut after a separator, or where the block ends if it
    holds none.
    """
    numbers: list[int] = []
    parts: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        text = normalised(text)
        if parts and size + len(text) >= BLOCK_CHARS:
            yield _block(numbers, parts)
            numbers, parts, size = [], [], 0
        while len(text) >= BLOCK_CHARS:
            cut = 1 + max(text.rfind(separator, 0, BLOCK_CHARS - 1) for separator in " \n\t,.;")
            cut = cut or BLOCK_CHARS - 1
            yield _block([number], [text[:cut]])
            text = text[cut:]
        numbers.append(number)
        parts.append(text)
        size += len(text) + 1
    if parts:
        yield _block(numbers, parts)


def _block(numbers: list[int], parts: list[str]) -> tuple[list[int], npt.NDArray[np.uint32], list[int]]:
    points = np.frombuffer("\n".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([len(part) + 1 for part in parts]).tolist()
    return list(numbers), points, ends


def _spans(points: npt.NDArray[np.uint32]) -> tuple[I64, I64]:
    """First and last character of each word in [n] code points."""
    kinds = np.zeros(len(points) + 2, np.uint8)
    kinds[1:-1] = _classes()[points]
    here = kinds[1:-1]
    starts = np.flatnonzero((here == SINGLE) | ((here == INSIDE) & (kinds[:-2] != INSIDE)))
    ends = np.flatnonzero((here == SINGLE) | ((here == INSIDE) & (kinds[2:] != INSIDE)))
    return starts, ends


def excerpt(text: str, first: int, count: int) -> str:
    """Words [first, first + count) of a text as `word_hashes` counts them, with what stands between, normalised."""
    text = normalised(text)
    starts, ends = _spans(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))
    chosen = slice(first, first + count)
    return text[starts[chosen][0]:ends[chosen][-1] + 1] if len(starts[chosen]) else ""


def _hash_block(points: npt.NDArray[np.uint32]) -> tuple[U64, I64]:
    """Hashes of the words in [n] code points, and where they start."""
    starts, ends = _spans(points)
    powers, inverse = _powers()
    sums = np.zeros(len(points) + 1, np.uint64)
    values = (points.astype(np.uint64) + np.uint64(1)) * np.uint64(0xFF51AFD7ED558CCD)
    np.cumsum(values * powers[:len(points)], out=sums[1:])
    return mix((sums[ends + 1] - sums[starts]) * inverse[starts]), starts


def ngram_hashes(words: U64, bounds: I64, n: int) -> tuple[U64, I64]:
    """([m] hashes of the n-grams of each text, [texts + 1] bounds) of the words of several texts.

    A text of fewer than n words, but at least one, has one hash: that of the whole text, which no n-gram has but by
    chance.
    """
    hashes = _windows(words, n, _NGRAM_BASE)
    lengths = np.diff(bounds)
    short = (lengths > 0) & (lengths < n)
    counts = np.where(short, 1, np.maximum(0, lengths - n + 1))
    new_bounds = np.concatenate([[0], np.cumsum(counts)])
    at = _window_starts(bounds, counts)
    found = np.empty(len(at), np.uint64)
    in_long = np.repeat(~short, counts)
    found[in_long] = hashes[at[in_long]]
    for number in np.flatnonzero(short).tolist():
        found[new_bounds[number]] = _whole(words[bounds[number]:bounds[number + 1]], _NGRAM_BASE)
    return found, new_bounds


def check_hashes(words: U64, bounds: I64, n: int, texts: I64, positions: I64) -> U64:
    """A second, independent hash of chosen n-grams: number `positions` [k] of `texts` [k], as `ngram_hashes` counts.

    Together with the first it makes 128 bits, which stand in for a comparison of the words themselves.
    """
    mixed = mix(words ^ np.uint64(0xA5A5A5A5A5A5A5A5))
    starts = bounds[texts] + positions
    lengths = np.diff(bounds)[texts]
    found = np.zeros(len(texts), np.uint64)
    whole = lengths < n
    power = 1
    for k in range(n - 1, -1, -1):
        found[~whole] += mixed[starts[~whole] + k] * np.uint64(power)
        power = power * _CHECK_BASE & _MASK
    for i in np.flatnonzero(whole).tolist():
        found[i] = _whole(mixed[starts[i]:starts[i] + lengths[i]], _CHECK_BASE)
    return found


def _window_starts(bounds: I64, counts: npt.NDArray[np.int64]) -> I64:
    """Index of the first word of each n-gram: bounds[i], bounds[i] + 1, ... counts[i] of them for each text i."""
    new_bounds = np.concatenate([[0], np.cumsum(counts)])
    return np.arange(new_bounds[-1]) - np.repeat(new_bounds[:-1] - bounds[:-1], counts)


def _windows(words: U64, n: int, base: int) -> U64:
    """[len - n + 1] polynomial hash of every n neighbours, across texts as well."""
    size = len(words) - n + 1
    if size <= 0:
        return np.zeros(0, np.uint64)
    found = words[:size].copy()
    factor = np.uint64(base)
    for k in range(1, n):
        found *= factor
        found += words[k:k + size]
    return found


def _whole(words: U64, base: int) -> Any:
    """Hash of a whole short text; its length is mixed in."""
    total = len(words)
    for word in words.tolist():
        total = (total * base + word) & _MASK
    return mix(np.array([total], np.uint64))[0]
