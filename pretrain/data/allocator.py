"""What the C library does with freed memory. Elsewhere than on glibc nothing happens."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the parameters (mallopt(3))."""
_LARGEST_THRESHOLD = 32 << 20
"""What its own adaptation of the second ends at; that of the first is twice as much."""


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MB for the next batch, from the first one on.

    By itself glibc learns that from the sizes it has seen freed. A process that only loads frees about a megabyte at a
    time: its pages went back to the system after each batch and were zeroed anew for the next, which took more than
    half of the time.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Give large freed blocks back to the system at once, while a model is built in parts.

    While weights are gathered, drawn and parted one after the other, what is kept of them leaves holes between the
    parts that stay, and the holes add up.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        keep_freed_memory()
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
