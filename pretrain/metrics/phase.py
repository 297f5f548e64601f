"""Figures of phases and memories from a forward's diagnostics (AFRB spec, section 11). Descriptions, not qualities.

Inputs are what `AFRBForCausalLM.forward(diagnostics=True)` returns; everything is computed in fp32 without gradient.
Phases are those of channel pairs by halves: psi = arg(h[..., j] + i h[..., H + j]).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NEAR = 4
"""Tokens beside a needle's that count as at it."""
_OPEN = (0.05, 0.95)
"""A gate outside of these is shut or wide open."""


@torch.no_grad()
def phase_coherence(hidden: Tensor, theta: Tensor | None = None) -> float:
    """|mean over t of e^{i psi}|, mean over rows and pairs: 1 where phases stand still, `random_coherence` by chance.

    A high value means states that point the same way at every token, collapsed ones too.

    Args:
        hidden: [B, T, D].
        theta: [B or 1, T]; with it, the same of psi - theta, which tells whether phases follow the clock.
    """
    half = hidden.shape[-1] // 2
    psi = torch.atan2(hidden[..., half:2 * half].float(), hidden[..., :half].float())
    if theta is not None:
        psi = psi - theta.to(psi.dtype)[..., None]
    return float(torch.hypot(psi.cos().mean(1), psi.sin().mean(1)).mean())


def random_coherence(length: int) -> float:
    """Expected coherence of random phases over `length` tokens."""
    return math.sqrt(math.pi / (4 * length))


@torch.no_grad()
def state_entropy(hidden: Tensor) -> Tensor:
    """[B, T] in [0, 1]: entropy of the shares of the squared norm that fall on each channel, over ln D."""
    squares = hidden.float().square()
    share = squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return -(share * share.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(-1) / math.log(hidden.shape[-1])


def entropy_flow(after: Tensor, before: Tensor) -> float:
    """Mean change of `state_entropy` from `before` to `after`, [B, T, D] each."""
    return float((state_entropy(after) - state_entropy(before)).mean())


@dataclass(frozen=True, slots=True)
class Curvature:
    """Where a memory's path bends: k_t = |m_{t+1} - 2 m_t + m_{t-1}|, of one sequence."""

    peak: int
    """Token where it bends most."""
    needle_ratio: float
    """Largest bend within 4 tokens of the needle over the largest of all."""
    before_readout: float
    """Share of the bending that lies before the first row that is read."""
    entropy: float
    """Of the profile over the logarithm of its length: near 1, no place stands out."""


@torch.no_grad()
def trace_curvature(trace: Tensor, needle_start: int, needle_len: int, first_row: int) -> Curvature:
    """Curvature of the states [T, D] of one sequence; T >= 4."""
    m = trace.float()
    bend = (m[2:] - 2 * m[1:-1] + m[:-2]).norm(dim=-1)  # bend[i] is at token i + 1
    share = bend / bend.sum().clamp(min=torch.finfo(torch.float32).tiny)
    low, high = max(0, needle_start - _NEAR - 1), max(0, needle_start + needle_len + _NEAR - 1)
    at_needle = float(bend[low:high].max()) if high > low and low < len(bend) else 0.0
    entropy = -(share * share.clamp(min=torch.finfo(torch.float32).tiny).log()).sum() / math.log(len(bend))
    largest = float(bend.max())
    return Curvature(int(bend.argmax()) + 1, at_needle / largest if largest else 0.0,
                     float(share[:max(0, first_row - 1)].sum()), float(entropy))


def phase_figures(diagnostics: Mapping[str, Tensor]) -> dict[str, float]:
    """All figures that the diagnostics of one forward give, by the names that metrics and reports use.

    `gamma_saturation` is the mean gate of the phase branch, `gamma_saturated_frac` the share of gates that are shut or
    wide open, `block_1/gamma` and `block_1/omega` gate and frequency of the first block; `pvm_memory_norm` is relative
    to what is written (alpha / sqrt(1 - beta^2) for independent inputs). A model without blocks has the first three
    only, of its last hidden states.
    """
    blocks = "theta" in diagnostics
    states = diagnostics["adapted" if blocks else "hidden"]
    found = {"phase_coherence": phase_coherence(states),
             "entropy_flow": entropy_flow(diagnostics["adapted"], diagnostics["embeddings"]),
             "phase_coherence_random": random_coherence(states.shape[1])}
    if blocks:
        found["phase_lock"] = phase_coherence(states, diagnostics["theta"][-1])
    if "gamma" in diagnostics:
        gates = diagnostics["gamma"].float()
        found["gamma_saturation"] = float(gates.mean())
        found["gamma_saturated_frac"] = float(((gates < _OPEN[0]) | (gates > _OPEN[1])).float().mean())
    for name in ("gamma", "omega"):
        found |= {f"block_{i}/{name}": float(value) for i, value in enumerate(diagnostics.get(name, ()), 1)}
    if "pvm_gate" in diagnostics:
        found["pvm_gate_strength"] = float(diagnostics["pvm_gate"].mean())
        found["pvm_gate_delta"] = float((diagnostics["pvm_gate"] - diagnostics["pvm_gate_start"]).mean())
        found["pvm_memory_norm"] = float(diagnostics["pvm_memory_norm"].mean())
    for name in ("readout_entropy", "readout_largest", "readout_cosine"):
        if name in diagnostics:
            found[name] = float(diagnostics[name].mean())
    return found
