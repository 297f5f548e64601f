"""The chunked loss equals the textbook one, in value and gradient, however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.ops import cross_entropy as module
from pretrain.ops.cross_entropy import chunked_cross_entropy


def make(n, d, v, dtype, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(d, v, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(v, d, generator=generator) * 0.3)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return hidden, head.to(dtype), labels


def reference(hidden, head, labels):
    """All logits at once, in fp32."""
    logits = head(hidden).float()
    counted = labels != -100
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    z = logits.logsumexp(-1)[counted].square().sum()
    return nll, counted.sum(), ((logits.argmax(-1) == labels) & counted).sum(), z


def gradients(sums, hidden, head, z_weight):
    grads = torch.autograd.grad(sums[0] + z_weight * sums[3], [hidden, *head.parameters()])
    return [g.float() for g in grads]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(n=st.integers(1, 40), v=st.integers(2, 50), chunk=st.integers(1, 45), ignored=st.sampled_from([0.0, 0.3, 1.0]),
       z_weight=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
def test_value_and_gradient_equal_the_reference(n, v, chunk, ignored, z_weight, seed):
    hidden, head, labels = make(n, 7, v, torch.float32, seed, ignored)
    ours, theirs = chunked_cross_entropy(hidden, labels, head, chunk), reference(hidden, head, labels)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, hidden, head, z_weight), gradients(theirs, hidden, head, z_weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 10])
def test_bf16_follows_the_reference_on_the_same_logits(chunk):
    """Same bf16 logits in, fp32 arithmetic inside: the value differs by summation order only."""
    hidden, head, labels = make(64, 16, 300, torch.bfloat16)
    ours, theirs = chunked_cross_entropy(hidden, labels, head, chunk), reference(hidden, head, labels)
    torch.testing.assert_close(ours.nll_sum, theirs[0], rtol=1e-5, atol=0)
    for a, b in zip(gradients(ours, hidden, head, 1e-3), gradients(theirs, hidden, head, 1e-3), strict=True):
        assert (a - b).norm() / b.norm() < 1e-2


def test_nothing_labelled_gives_zero_and_zero_gradient():
    hidden, head, labels = make(9, 4, 11, torch.float32, ignored=1.0)
    sums = chunked_cross_entropy(hidden, labels, head, 4)
    assert sums.nll_sum == 0 and sums.n_tokens == 0 and sums.n_correct == 0 and sums.z_sum == 0
    assert all(g.abs().max() == 0 for g in gradients(sums, hidden, head, 1.0))


def test_extreme_logits_stay_finite():
    hidden, head, labels = make(8, 4, 16, torch.float32, ignored=0.0)
    with torch.no_grad():
        head.weight.mul_(1e4)
    ours, theirs = chunked_cross_entropy(hidden, labels, head, 3), reference(hidden, head, labels)
    torch.testing.assert_close(ours.nll_sum, theirs[0])
    assert all(g.isfinite().all() for g in gradients(ours, hidden, head, 0.0))


class CountingHead(nn.Linear):
    """Counts its calls and the widest output it was asked for."""

    calls, widest = 0, 0

    def forward(self, x):
        self.calls += 1
        self.widest = max(self.widest, x.shape[0])
        return super().forward(x)


@pytest.mark.parametrize(("chunk", "forward_calls", "all_calls"), [(None, 1, 1), (32, 1, 1), (10, 4, 8)])
def test_recomputes_only_where_there_are_several_chunks(chunk, forward_calls, all_calls):
    head = CountingHead(8, 20, bias=False)
    hidden = torch.randn(32, 8, requires_grad=True)
    sums = chunked_cross_entropy(hidden, torch.zeros(32, dtype=torch.long), head, chunk)
    assert head.calls == forward_calls
    sums.nll_sum.backward()
    assert head.calls == all_calls and head.widest <= (chunk or 32)


def test_several_chunks_keep_no_logits_for_the_backward_pass():
    hidden, head, labels = make(64, 4, 1000, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, labels, head, 8)
    assert max(kept) <= max(head.weight.numel(), hidden.numel())


def test_the_default_chunk_bounds_the_bytes_of_logits(monkeypatch):
    monkeypatch.setattr(module, "LOSS_CHUNK_BYTES", 20 * 100 * 2)
    head = CountingHead(8, 100, bias=False).to(torch.bfloat16)
    chunked_cross_entropy(torch.randn(50, 8, dtype=torch.bfloat16), torch.zeros(50, dtype=torch.long), head)
    assert head.widest == 20


def test_recomputation_runs_under_the_autocast_of_the_forward_pass():
    hidden, head, labels = make(16, 8, 30, torch.float32)
    dtypes = []
    head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunked_cross_entropy(hidden, labels, head, 4)
    sums.nll_sum.backward()
    assert dtypes == [torch.bfloat16] * 8
    with torch.autocast("cpu", torch.bfloat16):
        whole = chunked_cross_entropy(hidden, labels, head, 16)
    for a, b in zip(gradients(whole, hidden, head, 0.0), (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3\)"):
        chunked_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), nn.Linear(4, 5))
