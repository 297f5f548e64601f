"""Ridge regression from what a memory says to rows of the output table (spec, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 0.2
"""Share of pairs that the fit does not see."""


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """A map Z W ~ E and how well it holds."""

    weight: Tensor
    """W, [d, D] fp64."""
    pairs: int
    """Pairs given, those held out included."""
    r2_train: float
    r2_heldout: float
    """Only this one means anything where there are fewer pairs than features."""
    cosine_train: float
    cosine_heldout: float
    rank: int
    """Numerical rank of the features."""
    condition: float
    """Of the system that was solved."""


def solve_ridge(features: Tensor, targets: Tensor, penalty: float, *, absolute: bool = False,
                dual: bool | None = None) -> Tensor:
    """argmin |Z W - E|^2 + lambda |W|^2, [d, D] in fp64.

    Args:
        features: Z, [N, d].
        targets: E, [N, D].
        penalty: lambda over the mean square of features, tr(Z^T Z) / d; `absolute`: lambda itself.
        dual: solve for N unknowns instead of d, which gives the same; None: where N < d.
    """
    z, e = features.double(), targets.double()
    scale = 1.0 if absolute else float(z.square().sum() / z.shape[1])
    strength = penalty * scale
    if dual if dual is not None else z.shape[0] < z.shape[1]:
        gram = z @ z.T + strength * torch.eye(z.shape[0], dtype=z.dtype, device=z.device)
        return z.T @ torch.cholesky_solve(e, torch.linalg.cholesky(gram))
    gram = z.T @ z + strength * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return torch.cholesky_solve(z.T @ e, torch.linalg.cholesky(gram))


def fit_ridge(features: Tensor, targets: Tensor, penalty: float, *, absolute: bool = False) -> RidgeFit:
    """Fit to the first 80 % of the pairs and judge on the others."""
    z, e = features.double(), targets.double()
    seen = len(z) - max(1, round(HELD_OUT * len(z)))
    weight = solve_ridge(z[:seen], e[:seen], penalty, absolute=absolute)
    said = z @ weight
    singular = torch.linalg.svdvals(z[:seen])
    scale = 1.0 if absolute else float(z[:seen].square().sum() / z.shape[1])
    squares = singular.square()
    smallest = float(squares[-1]) if seen >= z.shape[1] else 0.0
    cosine = torch.nn.functional.cosine_similarity(said, e, dim=-1)
    return RidgeFit(
        weight, len(z), r_squared(said[:seen], e[:seen]), r_squared(said[seen:], e[seen:]),
        float(cosine[:seen].mean()), float(cosine[seen:].mean()),
        int((singular > singular[0] * max(z.shape) * torch.finfo(z.dtype).eps).sum()),
        (float(squares[0]) + penalty * scale) / (smallest + penalty * scale))


def r_squared(said: Tensor, wanted: Tensor) -> float:
    """1 - |E - ZW|^2 / |E - mean E|^2; NaN where the targets are all alike."""
    spread = float((wanted - wanted.mean(0)).square().sum())
    return 1 - float((wanted - said).square().sum()) / spread if spread else float("nan")
