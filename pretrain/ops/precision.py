"""Arithmetic that must not be rounded to 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32; fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Products inside keep the dtype of their inputs, on the device of `tensor` (the meta device has no autocast)."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
