import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.metrics.lm import bits_per_byte, label_bytes, perplexity, token_weighted_loss

parts = st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10_000)), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(parts, st.randoms(use_true_random=False))
def test_loss_does_not_depend_on_how_tokens_are_split_or_ordered(items, random):
    nll, count = [a for a, _ in items], [b for _, b in items]
    whole = token_weighted_loss(nll, count)
    random.shuffle(items)
    shuffled = token_weighted_loss([a for a, _ in items], [b for _, b in items])
    merged = token_weighted_loss([math.fsum(nll)], [sum(count)])
    if sum(count) == 0:
        assert math.isnan(whole) and math.isnan(shuffled) and math.isnan(merged)
    else:
        assert whole == shuffled == merged == math.fsum(nll) / sum(count)


def test_loss_keeps_small_terms_beside_large_ones():
    nll = [1e8] + [1e-3] * 100_000
    assert token_weighted_loss(np.array(nll), np.ones(len(nll))) * len(nll) == pytest.approx(1e8 + 100, abs=1e-6)


def test_a_short_batch_does_not_weigh_more():
    assert token_weighted_loss([1000.0, 9.0], [1000, 1]) == pytest.approx(1009 / 1001)


def test_perplexity_inverts_log_and_never_raises():
    assert perplexity(math.log(8192)) == pytest.approx(8192)
    assert perplexity(1e4) == math.inf and perplexity(math.inf) == math.inf and math.isnan(perplexity(math.nan))


def test_uniform_bytes_cost_eight_bits():
    n = 1000
    assert bits_per_byte(n * math.log(256), n) == pytest.approx(8.0)
    assert math.isnan(bits_per_byte(3.0, 0))


def test_bits_per_byte_is_the_same_for_a_coarser_tokenizer_of_equal_likelihood():
    fine = bits_per_byte(4 * 1.5, n_bytes=8)
    coarse = bits_per_byte(2 * 3.0, n_bytes=8)
    assert fine == coarse


def test_label_bytes_counts_labelled_tokens_only():
    labels = np.array([[0, 2, -100], [1, -100, 2]])
    assert label_bytes(labels, np.array([1, 10, 100], np.int32)) == 1 + 100 + 10 + 100
    big = np.full(3, 2**30, np.int32)
    assert label_bytes(np.array([0, 1, 2]), big) == 3 * 2**30
