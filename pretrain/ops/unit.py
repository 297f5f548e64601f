"""Vectors of length 1."""

from __future__ import annotations

from torch import Tensor

from pretrain.ops.precision import wide

LENGTH_FLOOR = 1e-6


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) over the last axis, in fp32 (fp64 stays)."""
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(LENGTH_FLOOR)
