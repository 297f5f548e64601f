"""Rates of the needle task on predictions whose figures are known, and the exact nulls of the specification."""

from itertools import pairwise

import numpy as np
import pytest

from pretrain.metrics.intervals import binomial_tail, clopper_pearson, cluster_bootstrap, clustered_proportion
from pretrain.metrics.needle import Nulls, Predictions, Rate, by_distance, hits_needed, needle_rates

NEEDLE = np.arange(8).reshape(2, 4) + 10


def test_every_rate_of_a_small_case():
    free = np.array([[10, 11, 13, 99], [0, 0, 0, 17]])
    rank = np.array([[0, 0, 4, 5], [1, 9, 0, 0]])
    echo = np.array([[True] * 4, [False] * 4])
    rates = needle_rates(Predictions(NEEDLE, free, rank, echo, ~echo), top_k=5)
    assert {name: (rate.hits, rate.n) for name, rate in rates.items()} == {
        "needle_hit_rate": (3, 8), "needle_exact_match": (0, 2), "needle_partial_success_rate": (1, 2),
        "needle_bag_rate": (4, 8), "needle_hit_rate_tf": (4, 8), "needle_hit_rate_topk": (6, 8),
        "needle_echo_rate": (4, 8), "echo_rate_haystack": (4, 8)}
    assert rates["needle_hit_rate"].value == 0.375


def test_a_perfect_oracle_reaches_100_percent_and_what_was_not_predicted_has_no_rate():
    rates = needle_rates(Predictions(NEEDLE, NEEDLE.copy()), top_k=5)
    assert {name: rate.value for name, rate in rates.items()} == {
        "needle_hit_rate": 1.0, "needle_exact_match": 1.0, "needle_partial_success_rate": 1.0, "needle_bag_rate": 1.0}


def test_half_of_a_needle_is_a_partial_success_for_odd_lengths_too():
    needle = np.arange(5)[None]
    for right, expected in ((2, 0), (3, 1)):
        free = np.where(np.arange(5) < right, needle, -1)
        assert needle_rates(Predictions(needle, free), 5)["needle_partial_success_rate"].hits == expected


def test_intervals_resample_examples_and_are_exact_at_the_ends():
    rng = np.random.default_rng(0)
    clustered = np.repeat(rng.random((200, 1)) < 0.3, 16, axis=1)
    rate = Rate.of(clustered)
    wide, narrow = rate.ci[1] - rate.ci[0], np.diff(clopper_pearson(rate.hits, rate.n))[0]
    assert wide > 3 * narrow, "tokens of one needle are no independent trials"
    assert rate.ci == cluster_bootstrap(clustered.sum(1), np.full(200, 16))
    assert Rate.of(np.zeros((200, 16), bool)).ci == clopper_pearson(0, 3200)
    assert Rate.of(np.ones((200, 16), bool)).ci == clopper_pearson(3200, 3200)
    assert clustered_proportion([0, 0], [3, 4]) == clopper_pearson(0, 7)


def test_nulls_are_those_of_the_specification():
    sizes = {"pool_size": 31800, "context_len": 512, "needle_len": 16}
    nulls, top = Nulls.of(**sizes), Nulls.of(**sizes, top_k=5)
    assert nulls.uniform == pytest.approx(3.14e-5, rel=2e-3)
    assert top.uniform == pytest.approx(1.57e-4, rel=2e-3)
    assert nulls.context_bag == pytest.approx(0.00195, rel=2e-3)
    assert (nulls.needle_bag, top.needle_bag) == (0.0625, 0.3125)
    assert nulls.strongest == 0.0625
    assert Nulls.of(pool_size=64, context_len=8, needle_len=4, top_k=5).needle_bag == 1.0


def test_the_number_of_hits_that_chance_does_not_reach():
    assert [hits_needed(3200, p) for p in (1 / 31800, 1 / 512, 1 / 16)] == [3, 16, 245]
    for p in (0.01, 0.5):
        k = hits_needed(100, p)
        assert binomial_tail(k, 100, p) < 1e-3 <= binomial_tail(k - 1, 100, p)
    assert hits_needed(3, 0.9) == 4, "even all hits would not do"


def test_binomial_tail_against_the_sum():
    from math import comb
    exact = sum(comb(20, k) * 0.3**k * 0.7**(20 - k) for k in range(9, 21))
    assert binomial_tail(9, 20, 0.3) == pytest.approx(exact, rel=1e-12)
    assert binomial_tail(0, 20, 0.3) == 1.0
    with pytest.raises(ValueError, match="not a binomial"):
        binomial_tail(21, 20, 0.3)


def test_distance_groups_hold_every_example_once_in_order():
    rng = np.random.default_rng(1)
    distance = rng.permutation(np.arange(100, 203))
    hits = np.repeat((distance < 150)[:, None], 4, axis=1)
    bins = by_distance(hits, distance, 8)
    assert len(bins) == 8
    assert sum(b.rate.n for b in bins) == 103 * 4
    assert all(a.high < b.low for a, b in pairwise(bins))
    assert (bins[0].low, bins[-1].high) == (100, 202)
    assert bins[0].rate.value == 1.0
    assert bins[-1].rate.value == 0.0
    assert len(by_distance(hits[:3], distance[:3], 8)) == 3
