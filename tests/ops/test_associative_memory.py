"""The matrix memory equals its definition a token at a time; phase taps equal rotating and summing by hand."""

from __future__ import annotations

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.ops.associative_memory import delta_corrections, fading, final_state, read_all, read_rows
from pretrain.ops.gated_memory import CHUNK, FLOOR, read_gated
from pretrain.ops.phase import causal_taps, last_inputs, phase_taps, rotate

B, K, V = 2, 6, 5


def token_by_token(q, k, v, decay, resets, mask, initial, rate=None):
    """S_t = lambda S + k v^T, or the delta rule where there is a rate; r_t = S_t^T q_t."""
    state = torch.zeros(B, K, V, dtype=k.dtype) if initial is None else initial
    reads = []
    for t in range(k.shape[1]):
        real = mask[:, t, None, None].bool()
        lam = decay[:, t].view(B, -1, 1) if torch.is_tensor(decay) else decay
        faded = torch.where(resets[:, t, None, None] & real, 0.0, lam * state)
        value = v[:, t] if rate is None else rate[:, t, None] * (v[:, t] - (faded * k[:, t, :, None]).sum(1))
        state = torch.where(real, faded + k[:, t, :, None] * value[:, None], state)
        reads.append((state * q[:, t, :, None]).sum(1))
    return torch.stack(reads, 1), state


def draw(length, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(rand(B, length, K) - 0.5, dim=-1) for _ in range(2))
    resets, mask = rand(B, length) < 0.08, rand(B, length) > 0.1
    v = (rand(B, length, V) - 0.5) * mask[..., None]
    decay, rate = 1 - 0.3 * rand(B, length), rand(B, length) * mask
    return *(x.to(dtype) for x in (q, k, v)), resets, mask, decay.to(dtype), rate, (rand(B, K, V) - 0.5).to(dtype)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(length=st.integers(1, 40), chunk=st.integers(1, 17), kind=st.sampled_from(["one", "constant", "token"]),
       carried=st.booleans(), delta=st.booleans(), seed=st.integers(0, 99))
def test_every_way_of_reading_equals_the_definition(length, chunk, kind, carried, delta, seed):
    q, k, v, resets, mask, decay, rate, initial = draw(length, seed)
    decay = {"one": 1.0, "constant": 0.9, "token": decay}[kind]
    lam = torch.where(mask, torch.as_tensor(decay, dtype=torch.float64), 1.0)
    initial = initial if carried else None
    expected, end = token_by_token(q, k, v, lam, resets, mask, initial, rate if delta else None)
    fades = fading(B, length, decay, resets=resets, mask=mask)
    values = delta_corrections(k, v, rate, fades, initial, chunk) if delta else v
    reads, state = read_all(q, k, values, fades, initial, chunk)
    rows = torch.randint(0, length, (B, 7), generator=torch.Generator().manual_seed(seed))
    picked = read_rows(q.gather(1, rows[..., None].expand(-1, -1, K)), rows, k, values, fades, initial)
    for got, want in ((reads, expected), (state, end), (final_state(k, values, fades, initial), end),
                      (picked, expected.gather(1, rows[..., None].expand(-1, -1, V)))):
        assert float((got - want).abs().max()) < 1e-12


@pytest.mark.parametrize("delta", [False, True])
def test_gradients_equal_those_of_the_definition(delta):
    q, k, v, resets, mask, decay, rate, initial = draw(23, 5)
    decay = torch.where(mask, decay, 1.0)
    inputs = [x.requires_grad_() for x in (q, k, v, decay, rate, initial)]
    fades, v = fading(B, 23, decay, resets=resets, mask=mask), v * mask[..., None]
    values = delta_corrections(k, v, rate * mask, fades, initial, 8) if delta else v
    found = read_all(q, k, values, fades, initial, 8)
    expected = token_by_token(q, k, v, decay, resets, mask, initial, rate if delta else None)
    pull = torch.sin(torch.arange(found[0].numel(), dtype=torch.float64)).view_as(found[0])
    got, want = (torch.autograd.grad((r * pull).sum() + s.square().sum(), inputs, allow_unused=True, retain_graph=True)
                 for r, s in (found, expected))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or float((a - b).abs().max()) < 1e-11)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(length=st.integers(1, 40), chunk=st.integers(1, CHUNK), carried=st.booleans(), seed=st.integers(0, 99))
def test_a_gated_memory_equals_its_definition_with_its_gradients(length, chunk, carried, seed):
    q, k, v, resets, mask, _, _, initial = draw(length, seed)
    logs = torch.rand(B, length, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.2 * FLOOR
    inputs = [x.requires_grad_() for x in (q, k, v, logs, *((initial,) if carried else ()))]
    first = initial if carried else None
    found = read_gated(q, k, v * mask[..., None], logs, resets=resets, mask=mask, initial=first, chunk=chunk)
    decay = torch.where(mask[..., None], logs.clamp(min=FLOOR).exp(), 1.0)
    expected = token_by_token(q, k, v, decay, resets, mask, first)
    pull = torch.sin(torch.arange(found[0].numel(), dtype=torch.float64)).view_as(found[0])
    got, want = (torch.autograd.grad((r * pull).sum() + s.square().sum(), inputs) for r, s in (found, expected))
    for a, b in zip((*found, *got), (*expected, *want), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-11


def test_a_gated_memory_stays_finite_where_everything_is_forgotten_at_once():
    q, k, v = (torch.randn(1, 3 * CHUNK, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    logs = torch.full_like(q, -1e4).requires_grad_()
    reads, _ = read_gated(q, k.requires_grad_(), v, logs)
    exact, _ = read_gated(q.double(), k.double(), v.double(), logs.double())
    assert float(((reads - exact).abs().max() / exact.abs().max()).detach()) < 1e-5
    reads.sum().backward()
    assert bool(k.grad.isfinite().all())
    with pytest.raises(ValueError, match="at most 16"):
        read_gated(q, k, v, logs, chunk=17)


def test_long_memories_keep_their_faint_parts_in_fp32():
    """Decay of 0.99 over 2,048 tokens against fp64: sums of logarithms are wide."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2048, 8, generator=generator) for _ in range(3))
    exact = read_all(q.double(), k.double(), v.double(), fading(1, 2048, 0.99))[0]
    single = read_all(q, k, v, fading(1, 2048, 0.99))[0]
    assert single.dtype == torch.float32
    assert float((single - exact).abs().max() / exact.abs().max()) < 1e-6
    half = read_all(q.bfloat16(), k.bfloat16(), v.bfloat16(), fading(1, 2048, 1.0))[0]
    assert half.dtype == torch.float32


def complex_view(x):
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:2 * half])


@pytest.mark.parametrize("width", [6, 7])
def test_rotation_is_a_complex_factor_and_keeps_an_odd_channel(width):
    x = torch.randn(2, 4, width, dtype=torch.float64)
    for angles in (torch.randn(2, 4, 1, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)):
        turned = rotate(x, angles)
        torch.testing.assert_close(complex_view(turned), complex_view(x) * torch.polar(torch.ones_like(angles), angles))
        assert torch.equal(turned[..., 6:], x[..., 6:])
        torch.testing.assert_close(rotate(turned, -angles), x)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("documents", [False, True])
def test_phase_taps_equal_the_sum_by_hand(width, documents):
    x = torch.randn(2, 11, width, dtype=torch.float64)
    angles, weights = torch.randn(3, 1, 1, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    reach = torch.tensor([list(range(11)), [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]]) if documents else None
    got = phase_taps(x, angles, weights, reach=reach)
    for b in range(2):
        for t in range(11):
            far = t if reach is None else int(reach[b, t])
            for h in range(2):
                z = sum(complex(weights[i]) * cmath.exp(1j * float(angles[i, 0, 0, h]))
                        * complex(complex_view(x)[b, t - i, h]) for i in range(min(far, 2) + 1))
                assert abs(complex(complex_view(got)[b, t, h]) - z) < 1e-12
            odd = sum(float(weights[i] * x[b, t - i, -1]) for i in range(min(far, 2) + 1))
            assert width % 2 == 0 or abs(float(got[b, t, -1]) - odd) < 1e-12


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_phase_taps_have_the_gradients_of_a_linear_map(moving, documents):
    x, before = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    angles = torch.randn(3, *((2, 6) if moving else (1, 1)), 2, dtype=torch.float64)
    weights = torch.rand(3, dtype=torch.float64)
    reach = torch.tensor([[5, 6, 7, 8, 9, 10], [2, 3, 0, 1, 2, 0]]) if documents else None
    for past in (None, before):
        inputs = [x.requires_grad_(), *([] if past is None else [past.requires_grad_()])]
        assert torch.autograd.gradcheck(
            lambda x, past=None: phase_taps(x, angles, weights, before=past, reach=reach), inputs)


def test_taps_in_pieces_are_the_taps():
    x, taps = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    angles, weights = torch.randn(4, 1, 1, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    before, plain, turned = None, [], []
    for start, stop in [(0, 2), (2, 3), (3, 20)]:
        piece = x[:, start:stop]
        plain.append(causal_taps(piece, taps, before=before))
        turned.append(phase_taps(piece, angles, weights, before=before))
        before = last_inputs(piece, before, 3)
    torch.testing.assert_close(torch.cat(plain, 1), causal_taps(x, taps))
    torch.testing.assert_close(torch.cat(turned, 1), phase_taps(x, angles, weights))
    assert torch.equal(last_inputs(x[:, :2], None, 3), torch.cat([torch.zeros(2, 1, 3).double(), x[:, :2]], 1))
