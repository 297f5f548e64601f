"""Keyed bijections: permutations of any size, well mixed, one for each key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.bijection import as_keys, derive, permute, stream_key


def numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint64)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_number_is_an_image_exactly_once(n, key):
    assert np.array_equal(np.sort(permute(numbers(n), n, as_keys(key))), numbers(n))


@settings(deadline=None, derandomize=True, max_examples=20)
@given(n=st.integers(2**20, 2**63), start=st.integers(0, 2**19), key=st.integers(0, 2**64 - 1))
def test_large_domains_have_distinct_images_inside_the_domain(n, start, key):
    images = permute(numbers(4096) + np.uint64(start), n, as_keys(key))
    assert len(np.unique(images)) == 4096
    assert int(images.max()) < n


def test_a_key_an_element_equals_a_call_a_key():
    keys = derive(as_keys(3), numbers(500) % np.uint64(7))
    x = numbers(500) % np.uint64(91)
    together = permute(x, 91, keys)
    alone = [int(permute(x[i:i + 1], 91, keys[i:i + 1])[0]) for i in range(500)]
    assert together.tolist() == alone


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(n):
    """Chi-square over all n! permutations; the bound is passed by chance once in a million."""
    trials = 20_000
    keys = derive(as_keys(stream_key("test", n)), numbers(trials))
    images = np.stack([permute(np.full(trials, x, np.uint64), n, keys) for x in range(n)], axis=1)
    _, counts = np.unique(images, axis=0, return_counts=True)
    kinds = int(np.prod(np.arange(1, n + 1)))
    assert len(counts) == kinds
    expected = trials / kinds
    freedom = kinds - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("n", [1000, 65_536, 10**9 + 7])
def test_neighbours_land_independently(n):
    """Steps between the images of neighbours fill 20 equal bins of [0, n) evenly, and keys change every step."""
    x = numbers(min(n, 40_000))
    images = permute(x, n, as_keys(11))
    steps = (images[1:] - images[:-1]).astype(np.int64) % n
    counts = np.bincount(steps * 20 // n, minlength=20)
    expected = len(steps) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 60
    other = permute(x, n, as_keys(12))
    assert (images == other).mean() < 0.02


def test_streams_differ_and_are_stable():
    keys = {stream_key("order", 1), stream_key("order", 2), stream_key("order", "1"), stream_key("other", 1)}
    assert len(keys) == 4
    # Stored values: a change of them would change the data order of every run.
    assert stream_key("order", 1) == 0x95132E7AAE3FF6F1
    assert permute(numbers(8), 8, as_keys(1)).tolist() == [1, 6, 2, 3, 0, 5, 4, 7]
    assert permute(numbers(3), 10**12, as_keys(1)).tolist() == [79217377735, 155121524070, 609557865962]
