"""Tensors on their way from a loader process to the trainer: one anonymous file an update.

torch passes each tensor through shared memory that has a name for a moment; a job killed in that moment leaves it
behind, and memory of the machine with it. A memfd never has a name, and one file instead of one a tensor is cheaper.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

HAS_MEMFD = hasattr(os, "memfd_create")
_ALIGNMENT = 64

_Layout = tuple[tuple[str, str, tuple[int, ...], int], ...]
"""(name, numpy dtype, shape, byte offset) of each tensor."""


class Parcel:
    """Tensors that arrive in another process as a dict. Needs Linux (`HAS_MEMFD`)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the tensors into a new memfd; pickled is only its descriptor."""
        arrays = {name: tensor.contiguous().numpy() for name, tensor in self._tensors.items()}
        layout, size = [], 0
        for name, array in arrays.items():
            layout.append((name, array.dtype.str, array.shape, size))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        descriptor = os.memfd_create("update", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            for array, (_, _, _, offset) in zip(arrays.values(), layout, strict=True):
                _write(descriptor, array.reshape(-1).view(np.uint8).data, offset)
            return _unpack, (reduction.DupFd(descriptor), tuple(layout), size)
        finally:
            os.close(descriptor)


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _unpack(sent: Any, layout: _Layout, size: int) -> dict[str, torch.Tensor]:
    """The tensors, on pages shared with nobody else by now. They live as long as one of them does."""
    descriptor = sent.detach()
    try:
        # Populated: one system call maps all pages, where each first touch would cost a fault.
        pages = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    return {name: torch.from_numpy(np.ndarray(shape, dtype, pages, offset)) for name, dtype, shape, offset in layout}
