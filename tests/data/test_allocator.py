"""What becomes of freed memory, in processes without holes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")


def printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    return [float(word) for word in done.stdout.split()]


FREED = """
import torch
from pretrain.data.allocator import freed_memory_returned
from pretrain.monitor.memory import current_rss

def kept():
    size, count = 8 << 20, 24
    blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    before = current_rss()
    for i in range(0, count, 2):
        blocks[i] = torch.empty(0)
    return 1 - (before - current_rss()) / (size * count / 2)

def of_a_known_size():
    kept()  # the library has seen the size
    return kept()

"""
"""Share of freed blocks between living ones that a process still holds."""


def test_memory_freed_while_a_model_is_built_goes_back_at_once() -> None:
    """Without the cure, glibc keeps blocks of a size it has seen before. Each in a process without holes of its own:
    a hole that the first left would serve the second, whatever its limit for mapped memory."""
    without, = printed(FREED + "print(of_a_known_size())")
    cured, = printed(FREED + "with freed_memory_returned():\n    print(of_a_known_size())")
    assert without > 0.8
    assert cured < 0.2


FAULTS = """
import resource
import numpy as np
from pretrain.data.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):  # batches as a loader makes them: a few arrays of a megabyte that are all freed
        batch = [np.ones(1 << 17) for _ in range(3)]
        del batch
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 100

faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""
"""Pages a batch that the system has to hand out: without the cure, and with it."""


def test_pages_of_one_batch_serve_the_next() -> None:
    without, cured = printed(FAULTS)
    assert without > 100  # of 768
    assert cured < 10


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)
    monkeypatch.setattr("ctypes.CDLL", absent)
    keep_freed_memory()
