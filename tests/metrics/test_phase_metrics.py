"""Phase figures have the values that their definitions give on states made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.metrics import phase


def turning(theta, width=8, tail=0):
    """States [1, T, D] whose pairs have the phases theta [T] plus a constant a pair."""
    psi = theta[None, :, None] + torch.linspace(0, 3, width // 2)
    return torch.cat([psi.cos(), psi.sin(), torch.full((*psi.shape[:2], tail), 5.0)], -1)


def test_coherence_is_one_at_rest_none_after_whole_turns_and_chance_for_noise():
    assert phase.phase_coherence(turning(torch.zeros(50))) == pytest.approx(1)
    assert phase.phase_coherence(turning(2 * math.pi * torch.arange(50) / 50)) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(4, 500, 64, generator=torch.Generator().manual_seed(0))
    assert phase.phase_coherence(noise) == pytest.approx(phase.random_coherence(500), rel=0.1)
    assert phase.random_coherence(534) == pytest.approx(0.038, abs=5e-4)


def test_an_odd_channel_does_not_count():
    states = turning(torch.arange(20.0))
    assert phase.phase_coherence(turning(torch.arange(20.0), tail=1)) == phase.phase_coherence(states)


def test_the_lock_is_to_the_clock():
    theta = 6.0 * torch.log1p(torch.arange(100.0))
    states = turning(theta)
    assert phase.phase_coherence(states, theta[None]) == pytest.approx(1, abs=1e-5)
    assert phase.phase_coherence(states) < 0.5
    assert phase.phase_coherence(states, 2 * theta[None]) < 0.5


def test_entropy_flow_is_from_one_channel_to_all():
    one, every = torch.zeros(2, 3, 16), torch.full((2, 3, 16), 0.7)
    one[..., 4] = -2.0
    assert phase.entropy_flow(every, one) == pytest.approx(1) and phase.entropy_flow(one, every) == pytest.approx(-1)
    two = torch.zeros(1, 1, 16)
    two[..., :2] = torch.tensor([1.0, -1.0])
    assert float(phase.state_entropy(two)) == pytest.approx(math.log(2) / math.log(16))


def test_curvature_finds_the_bend():
    path = torch.stack([torch.arange(40.0), torch.zeros(40)], -1)
    path[20:, 1] = torch.arange(20.0)  # straight, then straight in another direction, bending at token 20
    found = phase.trace_curvature(path, needle_start=18, needle_len=3, first_row=36)
    assert found.peak in (19, 20) and found.needle_ratio == 1 and found.before_readout == pytest.approx(1)
    assert found.entropy < 0.2
    assert phase.trace_curvature(path, needle_start=30, needle_len=3, first_row=10).needle_ratio < 1e-6
    even = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    assert phase.trace_curvature(even, 5, 5, 1000).entropy > 0.98


def test_all_figures_of_a_forward():
    states = turning(torch.zeros(10))
    gates = torch.tensor([0.2, 0.99])
    given = {"embeddings": states, "adapted": states, "hidden": 0 * states, "theta": torch.zeros(2, 1, 10),
             "gamma": gates, "pvm_gate": gates, "pvm_gate_start": gates - 0.1, "pvm_memory_norm": torch.tensor([0.5]),
             "readout_entropy": torch.tensor([[[0.25]]])}
    found = phase.phase_figures(given)
    assert found["phase_coherence"] == found["phase_lock"] == pytest.approx(1) and found["entropy_flow"] == 0
    assert found["gamma_saturation"] == pytest.approx(0.595) and found["gamma_saturated_frac"] == 0.5
    assert found["pvm_gate_delta"] == pytest.approx(0.1) and found["pvm_memory_norm"] == 0.5
    assert found["readout_entropy"] == 0.25
    without = phase.phase_figures({"embeddings": states, "adapted": states, "hidden": turning(torch.arange(10.0))})
    assert without["phase_coherence"] < 1 and "gamma_saturation" not in without and "phase_lock" not in without
