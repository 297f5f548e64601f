"""Semantic textual similarity: do cosines of vectors rank pairs of texts as people do."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.metrics.intervals import Interval


def cosines(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Cosine of each pair of rows of a [n, d] and b [n, d]; 0 where one of them is the zero vector."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(f"two arrays [n, d] of one shape are needed, found {left.shape} and {right.shape}")
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products: NDArray[np.float64] = np.einsum("nd,nd->n", left, right)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation of two series [n]; NaN where one of them is constant."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"two series of one length of at least 2 are needed, found {a.shape} and {b.shape}")
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation of ranks of two series [n]; ties get the mean of their ranks."""
    from scipy.stats import rankdata
    return pearson(rankdata(np.asarray(x)), rankdata(np.asarray(y)))


def spearman_interval(x: ArrayLike, y: ArrayLike, *, level: float = 0.95, resamples: int = 1000,
                      seed: int = 0) -> Interval:
    """Percentile bootstrap interval of `spearman`, resampling pairs with replacement."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rng = np.random.default_rng(seed)
    estimates = np.empty(resamples)
    for i in range(resamples):
        picks = rng.integers(0, len(a), len(a))
        estimates[i] = spearman(a[picks], b[picks])
    known = estimates[np.isfinite(estimates)]
    if not len(known):
        return (float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))
