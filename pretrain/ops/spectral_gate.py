"""Weights of the spectral branch: a squared sigmoid of one head's logits (section 3.4 of the Spectra specification).

Despite the name there is neither a Fourier transform nor an entropy in the weights; the entropy of their rows is what
is logged, and what the entropy gate uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.fractal import Visibility
from pretrain.ops.precision import wide, without_autocast

SUM_FLOOR = 1e-6


def gate_weights(query: Tensor, key: Tensor, visibility: Visibility, norm: str) -> Tensor:
    """g' [B, S, S] in fp32 for query and key [B, S, s].

    `gate` divides each row of sigmoid(q k^T / sqrt(s))^2 by its sum over visible keys, `mean` by their number; `sum`
    is the compat arithmetic: nothing is divided, and padded keys count.
    """
    with without_autocast(query):
        gates = torch.sigmoid(wide(query) @ wide(key).mT / query.shape[-1] ** 0.5).square()
    if norm == "sum":
        return gates
    seen = _seen(visibility, gates)
    gates = gates * seen
    total = gates.sum(-1, keepdim=True) if norm == "gate" else seen.sum(-1, keepdim=True)
    return gates / total.clamp_min(SUM_FLOOR)


def normalised_entropy(weights: Tensor, visibility: Visibility) -> Tensor:
    """[B, S] in [0, 1]: entropy of each row of `weights` [B, S, S], brought to sum 1 over visible keys.

    It is divided by its largest possible value, the logarithm of their number (of 2 at least).
    """
    seen = _seen(visibility, weights)
    shares = weights * seen
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(SUM_FLOOR)
    visible = seen.expand_as(weights).sum(-1)
    return -torch.xlogy(shares, shares).sum(-1) / visible.clamp_min(2).log()


def text_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """[B]: mean of `values` [B, S] over real tokens."""
    if real is None:
        return values.mean(-1)
    return (values * real).sum(-1) / real.sum(-1).clamp_min(1)


def _seen(visibility: Visibility, like: Tensor) -> Tensor:
    """[B, 1 or S, S] in the dtype of `like`: 1 at keys that each query may see."""
    keys = visibility.keys()
    return like.new_ones(1, 1, like.shape[-1]) if keys is None else keys[:, 0].to(like.dtype)
