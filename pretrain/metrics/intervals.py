"""Confidence intervals: bootstrap over independent units, bootstrap of ratios over clusters, exact binomial.

Tokens of one window are not independent, so an interval over tokens would be far too narrow. Intervals of
token-weighted figures therefore resample whole clusters (windows or documents) and form the ratio of resampled sums.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike

Interval = tuple[float, float]
_CELLS = 1 << 22
"""Most index cells held at once (32 MB of int64)."""


def bootstrap_mean(values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of independent values [n].

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    return cluster_bootstrap(data, np.ones_like(data), level=level, resamples=resamples, seed=seed)


def cluster_bootstrap(numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95, resamples: int = 2000,
                      seed: int = 0) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), resampling whole clusters with replacement.

    With nll sums and token counts of windows this is the interval of the token-weighted loss. Clusters whose
    denominator is zero carry nothing and are dropped first. One cluster alone gives (NaN, NaN): its spread is unknown.

    Source: Cameron, Gelbach and Miller, Bootstrap-based improvements for inference with clustered errors (2008),
    pairs cluster bootstrap.

    Args:
        numerators: [c] sum of each cluster.
        denominators: [c] count of each cluster, at least 0.
        level: coverage.
        resamples: bootstrap replicates.
        seed: the interval is a pure function of the data and this.

    Raises:
        ValueError: no cluster with a positive denominator, unequal shapes, a level outside (0, 1), too few resamples.
    """
    top, bottom = np.asarray(numerators, np.float64).ravel(), np.asarray(denominators, np.float64).ravel()
    if top.shape != bottom.shape:
        raise ValueError(f"{top.size} numerators and {bottom.size} denominators")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie in (0, 1) and resamples {resamples} be at least 1")
    if (bottom < 0).any():
        raise ValueError("a denominator is negative")
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    n = top.size
    if n == 0:
        raise ValueError("an interval needs at least one cluster with a positive denominator")
    if n == 1:
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    estimates = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        picks = rng.integers(0, n, size=(stop - start, n))
        estimates[start:stop] = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Exact interval of a binomial proportion: it covers at least `level`, whatever the true proportion.

    Source: Clopper and Pearson, Biometrika 26 (1934); written with quantiles of the beta distribution.

    Raises:
        ValueError: successes outside 0..trials, no trials, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie in (0, 1)")
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    from scipy.special import betaincinv
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else cast(float, betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else cast(float, betaincinv(successes + 1, trials - successes, 1 - tail))
    return (float(low), float(high))


def clustered_proportion(successes: ArrayLike, trials: ArrayLike, *, level: float = 0.95, resamples: int = 2000,
                         seed: int = 0) -> Interval:
    """Interval of a proportion whose trials come in clusters, of counts [c] a cluster.

    The cluster bootstrap; at 0 and at 100 %, where every resample is the same, the exact binomial interval of all
    trials. There are then no clusters of hits to be seen, and independence of the trials is an assumption.

    Raises ValueError as `cluster_bootstrap` does.
    """
    hits, total = float(np.sum(successes)), float(np.sum(trials))
    if total and hits in (0.0, total):
        return clopper_pearson(int(hits), int(total), level=level)
    return cluster_bootstrap(successes, trials, level=level, resamples=resamples, seed=seed)


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) of a binomial: how easily chance alone does as well. Exact, by the incomplete beta function."""
    if not 0 <= successes <= trials or not 0 <= probability <= 1:
        raise ValueError(f"{successes} of {trials} at {probability} is not a binomial")
    from scipy.special import betainc
    return 1.0 if successes == 0 else float(betainc(successes, trials - successes + 1, probability))
