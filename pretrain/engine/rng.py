"""Random state of a process: Python, NumPy, torch and the accelerator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, torch.Tensor]:
    """All generators of this process as tensors (safetensors can hold them)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert version == 3 and kind == "MT19937"
    state = {
        "python": torch.from_numpy(np.array(words, dtype=np.int64)),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, torch.Tensor]) -> None:
    """Set all generators to a captured state."""
    gauss = float(state["python_gauss"][0])
    random.setstate((3, tuple(int(w) for w in state["python"]), None if gauss != gauss else gauss))
    position, has_gauss = (int(v) for v in state["numpy_position"])
    np.random.set_state(("MT19937", state["numpy_keys"].numpy().astype(np.uint32), position, has_gauss,
                         float(state["numpy_gauss"][0])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, rank: int, k: int = 0) -> None:
    """Seed every generator for training (dropout): the same run and rank draw the same numbers from batch `k` on."""
    mixed = np.random.SeedSequence([seed, rank, k]).generate_state(2)
    random.seed(int(mixed[0]))
    np.random.seed(int(mixed[1]))
    torch.manual_seed(int(mixed[0]) << 32 | int(mixed[1]))


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were."""
    state: dict[str, Any] = capture()
    try:
        yield
    finally:
        restore(state)
