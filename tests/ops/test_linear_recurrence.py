"""The chunked scan equals a loop over tokens, gradients too, for every form of decay, with resets, padding, carries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.ops.documents import document_starts
from pretrain.ops.linear_recurrence import linear_recurrence

LENGTHS = [1, 63, 64, 65, 518, 2070]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
B, D = 2, 5


def loop(w, a, initial=None, resets=None, mask=None):
    """The definition, a token at a time."""
    state = torch.zeros_like(w[:, 0]) if initial is None else initial
    a = {0: lambda: a.expand_as(w), 2: lambda: a[..., None], 1: lambda: a.expand_as(w), 3: lambda: a}[a.ndim]()
    states = []
    for t in range(w.shape[1]):
        before = state if resets is None else torch.where(resets[:, t, None], 0.0, state)
        new = a[:, t] * before + w[:, t]
        state = new if mask is None else torch.where(mask[:, t, None].bool(), new, state)
        states.append(state)
    return torch.stack(states, 1)


def draw(length, form, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    shape = {"number": (), "token": (B, length), "channel": (D,), "token and channel": (B, length, D)}[form]
    w, a, initial = rand(B, length, D) - 0.5, rand(*shape) ** 0.2, rand(B, D) - 0.5
    resets, mask = rand(B, length) < 0.05, rand(B, length) > 0.1
    return *(x.to(dtype).requires_grad_() for x in (w, a, initial)), resets, mask


def assert_close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        x, y = x.detach(), y.detach()
        assert float((x - y).abs().max()) <= tolerance * max(float(y.abs().max()), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["number", "token", "channel", "token and channel"])
@pytest.mark.parametrize("length", LENGTHS)
def test_states_and_gradients_equal_the_loop(length, form, dtype):
    w, a, initial, resets, mask = draw(length, form, dtype)
    for extra in ({}, {"resets": resets, "mask": mask}):
        found = linear_recurrence(w, a, initial=initial, **extra)
        expected = loop(w, a, initial, **extra)
        assert found.states.dtype == dtype
        assert_close([found.states, found.final], [expected, expected[:, -1]], TOLERANCE[dtype])
        if form == "number" and dtype == torch.float32:
            continue  # its gradient is one sum over all numbers, which cancel
        pull = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
        grads = [torch.autograd.grad((x * pull).sum() + last.square().sum(), (w, a, initial))
                 for x, last in (found, (expected, expected[:, -1]))]
        assert_close(*grads, TOLERANCE[dtype])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(length=st.integers(1, 40), chunk=st.integers(1, 50), form=st.sampled_from(["token", "channel"]),
       seed=st.integers(0, 99))
def test_every_chunk_size_gives_the_same(length, chunk, form, seed):
    w, a, initial, resets, mask = draw(length, form, torch.float64, seed)
    given_ = {"initial": initial, "resets": resets, "mask": mask}
    found, expected = linear_recurrence(w, a, chunk=chunk, **given_).states, loop(w, a, **given_)
    assert_close([found], [expected], 1e-13)
    pull = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    assert_close(*[torch.autograd.grad((x * pull).sum(), (w, a, initial)) for x in (found, expected)], 1e-12)


@pytest.mark.parametrize("form", ["token", "channel", "token and channel"])
def test_gradcheck(form):
    w, a, initial, resets, mask = draw(7, form, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: linear_recurrence(x[0], x[1], initial=x[2], resets=resets, mask=mask, chunk=3), (w, a, initial))


def test_a_sequence_in_pieces_is_the_sequence():
    w, a, initial, resets, mask = draw(50, "token", torch.float64)
    whole = linear_recurrence(w, a, initial=initial, resets=resets, mask=mask)
    state, pieces = initial, []
    for start, stop in [(0, 17), (17, 18), (18, 50)]:
        part = slice(start, stop)
        piece = linear_recurrence(w[:, part], a[:, part], initial=state, resets=resets[:, part], mask=mask[:, part])
        state = piece.final
        pieces.append(piece.states)
    assert_close([torch.cat(pieces, 1), state], whole, 1e-14)


def test_documents_and_padding_stand_alone():
    """With resets from document ids, each document is as if it were the whole input, whatever lies in the padding."""
    w, a, *_ = draw(30, "token", torch.float64)
    ids = torch.tensor([[0] * 11 + [3] * 19, [1] * 30])
    mask = torch.ones(B, 30, dtype=torch.long)
    mask[1, :6] = 0
    assert document_starts(None, None) is None
    states = linear_recurrence(w, a, resets=document_starts(ids, mask), mask=mask).states
    for row, start, stop in [(0, 0, 11), (0, 11, 30), (1, 6, 30)]:
        alone = linear_recurrence(w[row:row + 1, start:stop], a[row:row + 1, start:stop]).states
        assert_close([states[row, start:stop]], [alone[0]], 1e-14)
    garbage = torch.where(mask.bool()[..., None], w, float("nan"))
    assert torch.equal(states, linear_recurrence(garbage, a, resets=document_starts(ids, mask), mask=mask).states)


def test_strong_decay_over_a_long_sequence_stays_finite():
    """cumsum(w b^-t) b^t overflows fp32 at 546 tokens for b = .85; here nothing does."""
    w = torch.ones(1, 20_000, 1)
    states = linear_recurrence(w, torch.full((1,), 0.85)).states
    torch.testing.assert_close(states[0, -1], torch.tensor([1 / 0.15]))
    assert linear_recurrence(w, torch.zeros(1)).states.unique().tolist() == [1.0]


def test_halves_are_computed_in_fp32_under_autocast_too():
    w, a, *_ = draw(300, "token", torch.float32)
    half = w.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        states = linear_recurrence(half, a).states
    assert states.dtype == torch.float32
    assert torch.equal(states, linear_recurrence(half.float(), a).states)


def test_nothing_is_kept_beside_inputs_and_chunk_ends():
    w, a, initial, *_ = draw(2048, "token", torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_recurrence(w, a, initial=initial)
    own = {w.untyped_storage().data_ptr(), a.untyped_storage().data_ptr()}
    beside = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own)
    assert 0 < beside <= w.numel() / 16


def test_shapes_that_fit_nothing_are_named():
    with pytest.raises(ValueError, match=r"decay has shape \(3,\).*\[2, 4, 5\]"):
        linear_recurrence(torch.ones(2, 4, 5), torch.ones(3))
