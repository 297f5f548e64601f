"""What a learned write gate lets into a matrix memory: of the needle, of its mark and of everything else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from evaluation.needle_controls import parts
from evaluation.target import Target
from pretrain.data.needle import NeedleSource

_OPEN = 0.5


@dataclass(frozen=True, slots=True)
class GateFigures:
    """Shares that are written, 0 to 1, over all examples."""

    needle: float
    """Mean over the needle's tokens."""
    needle_least: float
    """The least of them."""
    elsewhere: float
    """Mean over the rest of the context, marks and keys left out."""
    elsewhere_sum: float
    """The same summed over an example's context, mean over examples: tokens that are written beside the needle."""
    elsewhere_open: float
    """Share of those tokens that are written by more than half: false marks."""
    tokens: int
    """Tokens that `elsewhere` is a mean of."""


@torch.no_grad()
def gate_figures(target: Target, source: NeedleSource, ids: np.ndarray, batch_size: int) -> dict[str, Any] | None:
    """Figures of the target's write gate on examples of one needle; None where there is no gate, or several needles."""
    task = source.config
    if not getattr(target.config and target.config.model, "pvm_write_gate", False) or task.needles > 1:
        return None
    needles, others = [], []
    for part in parts(ids, batch_size):
        rows = source.rows(part)
        tokens = torch.from_numpy(rows.tokens[:, :task.retrieval_start].copy()).to(target.device)
        last = torch.full((len(part), 1), tokens.shape[1] - 1, device=target.device)
        found = target.forward(input_ids=tokens, readout_positions=last, diagnostics=True).diagnostics
        if "write_gate" not in found:
            return None
        gate = found["write_gate"][:, :task.context_len].float().cpu().numpy()
        inside = rows.start[:, None] + np.arange(task.needle_len)
        needles.append(np.take_along_axis(gate, inside, axis=1))
        rest = np.ones_like(gate, bool)
        marked = rows.start[:, None] + np.arange(-task.marker_len, task.needle_len)
        np.put_along_axis(rest, marked, False, axis=1)
        others.append(gate[rest].reshape(len(gate), -1))
    needle, other = np.concatenate(needles), np.concatenate(others)
    return asdict(GateFigures(float(needle.mean()), float(needle.min()), float(other.mean()),
                              float(other.sum(1).mean()), float((other > _OPEN).mean()), other.size))
