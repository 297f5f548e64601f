"""Keyed bijections of [0, n): the random order of a dataset without a stored permutation.

`permute(x, n, key)` is one permutation of [0, n) for each key. It costs the same at every position, needs no memory
and answers thousands of positions in one call, so that any point of any epoch is reached at once.

The construction is a Feistel network on the digits of x in mixed radix a x b, a even and about sqrt(n), b = ceil(n / a)
(were both odd, only even permutations would come out). Each round adds a keyed hash of one digit to the other, modulo
that digit's radix. As a * b exceeds n by less than a, results outside [0, n) are rare (one in sqrt(n)); they are sent
through the network again until they fall inside (cycle walking), which keeps the map a bijection. See Black and
Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
It is a good shuffle, not a cipher.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

U64Array = NDArray[np.uint64]

ROUNDS = 8
SMALL, ROUNDS_SMALL = 1 << 12, 16
"""Small domains have few digits to mix and take more rounds until all permutations are equally likely."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_SHIFT = np.uint64(32)
# Odd 64-bit constants of the finaliser of Steele, Lea and Flood's SplitMix64.
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key from a path of names and numbers, as ("order", seed, source). Stable over releases and machines."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive(keys: U64Array, values: U64Array) -> U64Array:
    """Child keys, one for each pair of key and value (broadcast): SplitMix64 of their combination. uint64 -> uint64."""
    z = (keys ^ _splitmix(values + np.uint64(1))) * np.uint64(_GOLDEN)
    return _splitmix(z)


def as_keys(key: int) -> U64Array:
    """A key as a [1] array, which broadcasts against any number of positions."""
    return np.array([key & _MASK], dtype=np.uint64)


def permute(x: U64Array, n: int, keys: U64Array) -> U64Array:
    """Images of `x` [N] in [0, n) under the permutation of each element's key ([1] or [N]). Returns uint64 [N]."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 2
    a += a % 2
    b = -(-n // a)
    y = _network(x, a, b, keys)
    outside = np.flatnonzero(y >= np.uint64(n))
    while outside.size:
        y[outside] = _network(y[outside], a, b, keys if keys.size == 1 else keys[outside])
        outside = outside[y[outside] >= np.uint64(n)]
    return y


def _splitmix(z: U64Array) -> U64Array:
    """Output function of SplitMix64: a mixing bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def _network(x: U64Array, a: int, b: int, keys: U64Array) -> U64Array:
    """One pass over the digits (high in [0, a), low in [0, b)) of x = high * b + low."""
    radix_high, radix_low = np.uint64(a), np.uint64(b)
    high = x // radix_low
    low = x - high * radix_low
    hashed = np.empty_like(high)
    for number in range(ROUNDS_SMALL if a * b < SMALL else ROUNDS):
        round_key = _splitmix(keys + np.uint64((number + 1) * _GOLDEN & _MASK))
        target, other, radix = (high, low, radix_high) if number % 2 == 0 else (low, high, radix_low)
        _hash_below(other, round_key, radix, hashed)
        target += hashed
        np.subtract(target, radix, out=hashed)
        # Unsigned wrap-around makes target - radix huge where target < radix, so the smaller one is target mod radix.
        np.minimum(target, hashed, out=target)
    high *= radix_low
    high += low
    return high


def _hash_below(digit: U64Array, key: U64Array, radix: np.uint64, out: U64Array) -> None:
    """A keyed hash of `digit` in [0, radix), into `out`; radix is at most 2**32."""
    np.bitwise_xor(digit, key, out=out)
    out *= _M1
    out ^= out >> _SHIFT
    out *= _M2
    out >>= _SHIFT
    out *= radix
    out >>= _SHIFT
