"""Peak memory of this process and of its accelerator, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


def peak_rss() -> int:
    """Largest resident set since the last `reset_peak_rss`, or since the start where that could not be reset."""
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_rss() -> int:
    """Resident set now."""
    import psutil
    return int(psutil.Process().memory_info().rss)


def reset_peak_rss() -> bool:
    """Start a new peak from what is resident now. False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): reset the high-water mark
        return True
    except OSError:
        return False


def peak_device_memory(device: torch.device) -> int | None:
    """Largest sum of tensors on a CUDA device since the last `reset_peak_device_memory`; None on other devices."""
    if device.type != "cuda":
        return None
    import torch
    return int(torch.cuda.max_memory_allocated(device))


def reset_peak_device_memory(device: torch.device) -> None:
    """Start a new peak on a CUDA device."""
    if device.type == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats(device)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
