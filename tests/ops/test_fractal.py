"""Fractal attention against loops over tokens, the fused form against the explicit one, and what padding does."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.ops.fractal import Visibility, explicit_attention, fused_attention, fused_features

B, NH, S, D = 3, 2, 13, 8


def inputs(seed=0, dtype=torch.float64, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(B, NH, S, D, generator=g, dtype=torch.float64)).to(dtype) for _ in range(3)]


def padded():
    real = torch.arange(S) < torch.tensor([[S], [S - 5], [1]])
    return Visibility(real, None)


def slow_row_attention(q, k, v, weights):
    """One head of one text without padding, token by token: q, k, v [n, d] -> [n, d]."""
    n, d = q.shape
    a = [[sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) / math.sqrt(d) for j in range(n)] for i in range(n)]
    for w in weights:
        gram = [[sum(a[i][m] * a[j][m] for m in range(n)) for j in range(n)] for i in range(n)]
        norms = [max(math.sqrt(sum(x * x for x in row)), 1e-6) for row in gram]
        a = [[a[i][j] + float(w) * gram[i][j] / norms[i] for j in range(n)] for i in range(n)]
    out = torch.zeros(n, d, dtype=torch.float64)
    for i in range(n):
        top = max(a[i])
        p = [math.exp(x - top) for x in a[i]]
        for j in range(n):
            out[i] += p[j] / sum(p) * v[j]
    return out


@pytest.mark.parametrize("weights", [[], [0.3], [0.3, -0.7]])
def test_a_padded_text_attends_as_it_does_alone_by_the_formula(weights):
    q, k, v = inputs()
    visibility = padded()
    found = explicit_attention(q, k, v, [torch.tensor(w, dtype=torch.float64) for w in weights], visibility)
    for b in range(B):
        n = int(visibility.real[b].sum())
        for h in range(NH):
            want = slow_row_attention(q[b, h, :n], k[b, h, :n], v[b, h, :n], weights)
            torch.testing.assert_close(found[b, h, :n], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("visibility", [Visibility(None, None), padded()], ids=["whole", "padded"])
@pytest.mark.parametrize("weight", [0.02, 0.9, -0.4, None])
def test_fused_equals_explicit(weight, visibility):
    """fp64, 1e-10: outputs of real tokens, and gradients by everything."""
    real = torch.ones(B, S, dtype=torch.bool) if visibility.real is None else visibility.real
    results = []
    for fused in (True, False):
        q, k, v = (t.requires_grad_() for t in inputs(spread=2.0))
        w = None if weight is None else torch.tensor(weight, dtype=torch.float64, requires_grad=True)
        if fused:
            out = fused_attention(q, k, v, w, visibility)
            again = fused_attention(q, k, v, w, visibility, written_out=True)
            torch.testing.assert_close(out, again, rtol=0, atol=1e-12)
        else:
            out = explicit_attention(q, k, v, [] if w is None else [w], visibility)
        kept = out.transpose(1, 2)[real]
        (kept * torch.arange(kept.numel(), dtype=torch.float64).view_as(kept).sin()).sum().backward()
        results.append([kept, q.grad, k.grad, v.grad] + ([] if w is None else [w.grad]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gradients_of_the_features_are_those_of_the_formula():
    q, k, _ = (t.requires_grad_() for t in inputs())
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    real = padded().real
    assert torch.autograd.gradcheck(lambda *x: fused_features(*x, real), (q, k, w))


def test_what_stands_in_padding_is_not_seen():
    """Values, keys and queries of padded tokens may be anything finite."""
    visibility = padded()
    hidden = ~visibility.real[:, None, :, None]
    for attend in (lambda q, k, v, w: fused_attention(q, k, v, w, visibility),
                   lambda q, k, v, w: explicit_attention(q, k, v, [w], visibility)):
        w = torch.tensor(0.5, dtype=torch.float64)
        results = []
        for filler in (0.0, 50.0):
            q, k, v = (t.masked_fill(hidden, filler) for t in inputs())
            results.append(attend(q, k, v, w).masked_fill(hidden, 0))
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_rows_without_a_token_are_finite_and_pull_nothing():
    visibility = Visibility(torch.zeros(B, S, dtype=torch.bool), None)
    for fused in (True, False):
        q, k, v = (t.requires_grad_() for t in inputs(dtype=torch.float32))
        w = torch.tensor(0.5, requires_grad=True)
        out = fused_attention(q, k, v, w, visibility) if fused else explicit_attention(q, k, v, [w], visibility)
        assert out.isfinite().all()
        (out * 0).sum().backward()
        assert all(t.grad.isfinite().all() and not t.grad.any() for t in (q, k, v, w))


def test_documents_in_a_row_attend_as_each_does_alone():
    q, k, v = inputs()
    owner = torch.tensor([0] * 4 + [1] * 6 + [2] * 3).expand(B, S)
    together = owner[:, :, None] == owner[:, None, :]
    w = torch.tensor(0.6, dtype=torch.float64)
    found = explicit_attention(q, k, v, [w, w], Visibility(None, together))
    for start, stop in ((0, 4), (4, 10), (10, 13)):
        alone = explicit_attention(*(t[:, :, start:stop] for t in (q, k, v)), [w, w], Visibility(None, None))
        torch.testing.assert_close(found[:, :, start:stop], alone, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="explicit form"):
        fused_attention(q, k, v, w, Visibility(None, together))


def enrichment(q, k, v, visibility, **options):
    """How far one strong round moves the output of each real token of each text."""
    off, on = (explicit_attention(q, k, v, [torch.tensor(w, dtype=q.dtype)], visibility, **options) for w in (0.0, 3.0))
    moved = (on - off).abs().amax((1, 3))
    return [float(moved[b][visibility.real[b]].max()) for b in range(B)]


def test_the_published_order_of_mask_and_gram_product_switches_enrichment_off_on_padded_text():
    """W2: only the longest text of a batch is enriched there; here all that have more than one token are."""
    q, k, v = inputs()
    published = enrichment(q, k, v, padded(), penalty_first=True)
    assert published[0] > 0.1 and max(published[1:]) < 1e-4
    corrected = enrichment(q, k, v, padded())
    assert min(corrected[:2]) > 0.1


def test_the_published_order_overflows_in_half_precision():
    """W3: (10^4)^2 is beyond fp16, and inf / inf is no number. The corrected order stays finite."""
    q, k = (t.half() for t in inputs()[:2])
    logits = q @ k.mT / D**0.5 + (-1e4 * (~padded().real).half())[:, None, None]
    gram = logits @ logits.mT
    assert (gram / gram.norm(dim=-1, keepdim=True)).isnan().any()
    q, k, v = inputs(dtype=torch.float16)
    assert explicit_attention(q, k, v, [torch.tensor(0.5)], padded()).isfinite().all()


def test_unpadded_text_gives_the_same_in_both_orders():
    q, k, v = inputs()
    w = torch.tensor(0.7, dtype=torch.float64)
    one = explicit_attention(q, k, v, [w], Visibility(torch.ones(B, S, dtype=torch.bool), None), penalty_first=True)
    torch.testing.assert_close(one, explicit_attention(q, k, v, [w], Visibility(None, None)), rtol=0, atol=1e-13)


def test_16_bit_inputs_are_enriched_in_fp32():
    exact = inputs(dtype=torch.float32)
    w = torch.tensor(0.5)
    rounded = [t.bfloat16() for t in exact]
    want = explicit_attention(*(t.float() for t in rounded), [w], padded())
    for found in (explicit_attention(*rounded, [w], padded()), fused_attention(*rounded, w, padded())):
        assert found.dtype == torch.bfloat16
        real = padded().real[:, None, :, None].expand_as(found)
        torch.testing.assert_close(found[real].float(), want[real], rtol=0, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        under = explicit_attention(*exact, [w], padded())
    torch.testing.assert_close(under, explicit_attention(*exact, [w], padded()), rtol=0, atol=1e-6)
