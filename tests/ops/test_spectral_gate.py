"""Weights of the spectral branch against loops over tokens; their entropy; what padding does to the published form."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.ops.fractal import Visibility
from pretrain.ops.spectral_gate import gate_weights, normalised_entropy, text_mean

B, S, WIDTH = 3, 9, 6
REAL = torch.arange(S) < torch.tensor([[S], [4], [1]])
PADDED, WHOLE = Visibility(REAL, None), Visibility(None, None)


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, WIDTH, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def slow_gates(q, k):
    """[n][n] squared sigmoids of one text's logits."""
    n, scale = len(q), math.sqrt(WIDTH)
    return [[(1 / (1 + math.exp(-float(q[i] @ k[j]) / scale)))**2 for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("norm", ["gate", "mean", "sum"])
def test_weights_are_those_of_the_formula_on_the_text_alone(norm):
    q, k = inputs()
    found = gate_weights(q, k, PADDED, norm)
    for b in range(B):
        n = S if norm == "sum" else int(REAL[b].sum())
        for i in range(n):
            row = slow_gates(q[b, :n], k[b, :n])[i]
            divisor = {"gate": sum(row), "mean": n, "sum": 1}[norm]
            want = torch.tensor([g / divisor for g in row] + [0.0] * (S - n), dtype=torch.float64)
            torch.testing.assert_close(found[b, i], want, rtol=0, atol=1e-12)


def test_entropy_is_that_of_each_row_over_its_largest_value():
    q, k = inputs()
    for norm in ("gate", "mean"):
        found = normalised_entropy(gate_weights(q, k, PADDED, norm), PADDED)
        for b in range(B):
            n = int(REAL[b].sum())
            for i in range(n):
                row = slow_gates(q[b, :n], k[b, :n])[i]
                shares = [g / sum(row) for g in row]
                want = -sum(p * math.log(p) for p in shares) / math.log(max(n, 2))
                assert float(found[b, i]) == pytest.approx(want, abs=1e-12)
    even = torch.ones(1, 5, 5)
    assert normalised_entropy(even, WHOLE).tolist() == [pytest.approx([1.0] * 5)]
    assert normalised_entropy(torch.eye(5)[None], WHOLE).abs().max() < 1e-6


def test_mean_over_real_tokens():
    values = torch.arange(S, dtype=torch.float64).expand(B, S)
    assert text_mean(values, REAL).tolist() == [4.0, 1.5, 0.0]
    assert text_mean(values, None).tolist() == [4.0] * 3


def test_documents_in_a_row_do_not_see_each_other():
    q, k = inputs()
    owner = torch.tensor([0] * 4 + [1] * 5).expand(B, S)
    both = gate_weights(q, k, Visibility(None, owner[:, :, None] == owner[:, None, :]), "gate")
    torch.testing.assert_close(both[:, 4:, 4:], gate_weights(q[:, 4:], k[:, 4:], WHOLE, "gate"))
    assert not both[:, :4, 4:].any() and not both[:, 4:, :4].any()


def test_the_published_sum_counts_padding_and_the_corrected_weights_do_not():
    """W1: the branch's output grows with every padded token there."""
    q, k = inputs()
    alone = gate_weights(q[:, :4], k[:, :4], WHOLE, "sum").sum(-1)
    beside = gate_weights(q, k, Visibility(torch.arange(S).expand(B, S) < 4, None), "sum")[:, :4].sum(-1)
    assert (beside > 1.3 * alone).all()
    corrected = gate_weights(q, k, Visibility(torch.arange(S).expand(B, S) < 4, None), "gate")
    assert not corrected[:, :, 4:].any()


def test_weights_are_fp32_whatever_the_inputs():
    q, k = inputs(torch.bfloat16)
    found = gate_weights(q, k, PADDED, "gate")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gate_weights(q.float(), k.float(), PADDED, "gate"), rtol=0, atol=0)


def test_a_row_without_a_token_is_zero():
    q, k = inputs(torch.float32)
    nothing = Visibility(torch.zeros(B, S, dtype=torch.bool), None)
    weights = gate_weights(q.requires_grad_(), k, nothing, "gate")
    assert not weights.any() and normalised_entropy(weights, nothing).isfinite().all()
    weights.sum().backward()
    assert q.grad.isfinite().all()
