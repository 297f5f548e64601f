"""Small parts that several modules of Spectra share."""

from __future__ import annotations

from torch import Tensor, nn

NORM_EPS = 1e-5


class ResidualLinear(nn.Linear):
    """A linear layer whose result is added to the residual stream; its weights begin smaller by sqrt(2 L)."""


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm as all of Spectra has it."""
    return nn.LayerNorm(width, eps=NORM_EPS)


def register_gate(module: nn.Module, name: str, first: Tensor | None, *, trained: bool) -> None:
    """A parameter where it is trained, else a buffer; None is neither."""
    if trained and first is not None:
        module.register_parameter(name, nn.Parameter(first))
    else:
        module.register_buffer(name, first)
