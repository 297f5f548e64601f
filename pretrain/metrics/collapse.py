"""Whether the vectors of different texts still differ."""

from __future__ import annotations

import torch


def effective_rank(vectors: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred vectors [n, d]: 1 (a line) to min(n - 1, d).

    Source: Roy and Vetterli, The effective rank (2007). NaN where all vectors are equal, and where one is not finite.
    """
    centred = vectors.double() - vectors.double().mean(0)
    if not bool(torch.isfinite(centred).all()):
        return float("nan")
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    if total <= 1e-12 * max(1.0, float(vectors.double().norm())):
        return float("nan")
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def mean_cosine(vectors: torch.Tensor) -> float:
    """Mean cosine of all pairs of different rows of [n, d], n >= 2: 1 is collapse, 0 about what random vectors give."""
    n = len(vectors)
    if n < 2:
        raise ValueError(f"at least two vectors are needed, found {n}")
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    total = unit.sum(0)
    return float((total @ total - (unit * unit).sum()) / (n * (n - 1)))


def alignment(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared distance of the unit vectors of matching rows of a and b, both [n, d]: 0 is perfect.

    Source: Wang and Isola, Understanding contrastive representation learning through alignment and uniformity (2020).
    """
    left = torch.nn.functional.normalize(a.double(), dim=1)
    right = torch.nn.functional.normalize(b.double(), dim=1)
    return float((left - right).square().sum(1).mean())


def uniformity(vectors: torch.Tensor) -> float:
    """log of the mean of exp(-2 * squared distance) over all pairs of different unit vectors [n, d]: 0 is collapse,
    about -4 is uniform on a sphere of many dimensions. Source: as `alignment`.
    """
    if len(vectors) < 2:
        raise ValueError(f"at least two vectors are needed, found {len(vectors)}")
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return float(torch.pdist(unit).square().mul(-2).exp().mean().log())
