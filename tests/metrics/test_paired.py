"""Paired differences against the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pretrain.metrics.paired import paired_difference


def test_mean_and_interval_are_those_of_the_paired_t_test() -> None:
    a, b = [0.31, 0.35, 0.30, 0.36], [0.28, 0.33, 0.29, 0.30]
    mean, interval = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx(0.03)
    assert interval == pytest.approx((expected.low, expected.high))


def test_what_seeds_share_cancels() -> None:
    seeds = np.array([5.0, -3.0, 40.0])
    mean, interval = paired_difference((seeds + 1.0).tolist(), seeds.tolist())
    assert mean == pytest.approx(1.0)
    assert interval == pytest.approx((1.0, 1.0))


def test_one_pair_has_no_interval() -> None:
    assert paired_difference([2.0], [1.5]) == (0.5, None)


@pytest.mark.parametrize(("a", "b", "level"), [([], [], 0.95), ([1.0], [1.0, 2.0], 0.95), ([1.0], [1.0], 1.0)])
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float], level: float) -> None:
    with pytest.raises(ValueError, match=r"values|level"):
        paired_difference(a, b, level=level)
