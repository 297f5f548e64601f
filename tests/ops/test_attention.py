"""Documents stay apart, and the blocked attention equals the textbook formula under every mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.ops.attention import blocked_attention
from pretrain.ops.documents import attention_bias, document_layout, query_blocks


def random_documents(batch, length, seed):
    """Ids [B, T] with breaks at random places, and a mask with some padding at either end of a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(batch, length, generator=generator) < 0.2).cumsum(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, pads in enumerate(torch.randint(0, max(1, length // 2), (batch,), generator=generator).tolist()):
        mask[row, length - pads if row % 2 else 0:length if row % 2 else pads] = 0
    return ids, mask


def slow_layout(ids, mask):
    """Walk over each row."""
    starts, ends = torch.zeros_like(ids), torch.zeros_like(ids)
    for b in range(ids.shape[0]):
        key = [(int(i), bool(m)) if m else ("pad",) for i, m in zip(ids[b], mask[b], strict=True)]
        for t in range(len(key)):
            first = last = t
            while first and key[first - 1] == key[t]:
                first -= 1
            while last + 1 < len(key) and key[last + 1] == key[t]:
                last += 1
            starts[b, t], ends[b, t] = first, last + 1
    return starts, ends


cases = given(batch=st.integers(1, 3), length=st.integers(1, 24), seed=st.integers(0, 999), causal=st.booleans())
checked = settings(deadline=None, derandomize=True, max_examples=30)


@checked
@cases
def test_layout_and_mask_equal_a_walk_over_the_tokens(batch, length, seed, causal):
    ids, mask = random_documents(batch, length, seed)
    layout = document_layout(ids, mask)
    starts, ends = slow_layout(ids, mask)
    assert torch.equal(layout.starts, starts) and torch.equal(layout.ends, ends)
    bias = attention_bias(layout, length, length, causal=causal, dtype=torch.float32, device=ids.device)
    for b in range(batch):
        for i in range(length):
            sees = [starts[b, i] <= j < (i + 1 if causal else ends[b, i]) for j in range(length)]
            assert (bias[b, 0, i] == 0).tolist() == sees and sees[i]


@checked
@cases
def test_blocks_cover_every_visible_pair(batch, length, seed, causal):
    layout = document_layout(*random_documents(batch, length, seed))
    bias = attention_bias(layout, length, length, causal=causal, dtype=torch.float32, device=torch.device("cpu"))
    left = bias.isfinite().clone()
    blocks = query_blocks(layout, length, causal=causal, size=5)
    for block in blocks:
        left[:, :, block.start:block.stop, block.key_start:block.key_stop] = False
    assert not left.any() and sum(b.stop - b.start for b in blocks) == length


@checked
@given(batch=st.integers(1, 2), length=st.integers(1, 20), seed=st.integers(0, 999), window=st.integers(1, 22),
       documents=st.booleans())
def test_a_window_hides_what_lies_further_back_and_blocks_cover_the_rest(batch, length, seed, window, documents):
    layout = document_layout(*random_documents(batch, length, seed)) if documents else None
    device, kind = torch.device("cpu"), torch.float32
    whole = attention_bias(layout, length, length, causal=True, dtype=kind, device=device)
    bias = attention_bias(layout, length, length, causal=True, dtype=kind, device=device, window=window)
    near = torch.tensor([[i - j < window for j in range(length)] for i in range(length)])
    assert torch.equal(bias == 0, (whole == 0) & near)
    tail = attention_bias(layout, 1, length, causal=True, dtype=kind, device=device, window=window)
    assert torch.equal(tail, bias[:, :, -1:])
    left = bias.isfinite().clone()
    blocks = query_blocks(layout, length, causal=True, size=5, window=window)
    for block in blocks:
        assert block.key_start >= block.start - window + 1
        left[:, :, block.start:block.stop, block.key_start:block.key_stop] = False
    assert not left.any() and sum(b.stop - b.start for b in blocks) == length


def test_no_ids_and_no_mask_is_one_document():
    assert document_layout(None, None) is None
    ones = document_layout(None, torch.ones(2, 5))
    assert ones.starts.eq(0).all() and ones.ends.eq(5).all() and torch.equal(ones.positions[0], torch.arange(5))


@checked
@given(groups=st.sampled_from([1, 2]), repeat=st.sampled_from([1, 3]), length=st.integers(1, 20),
       seed=st.integers(0, 999), causal=st.booleans(), documents=st.booleans())
def test_blocked_attention_equals_the_formula(groups, repeat, length, seed, causal, documents):
    generator = torch.Generator().manual_seed(seed)
    batch, width = 2, 8
    query = torch.randn(batch, groups * repeat, length, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, batch, groups, length, width, generator=generator, dtype=torch.float64)
    layout = document_layout(*random_documents(batch, length, seed)) if documents else None
    bias = attention_bias(layout, length, length, causal=causal, dtype=torch.float64, device=torch.device("cpu"))
    inputs = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (query, key, value)]
    blocks = query_blocks(layout, length, causal=causal, size=6)
    ours = blocked_attention(*inputs, bias, blocks, 0.4).transpose(1, 2)
    keys, values = (t.repeat_interleave(repeat, 1) for t in inputs[1:])
    theirs = (0.4 * inputs[0] @ keys.transpose(2, 3) + bias).softmax(-1) @ values
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_is_as_exact_as_its_rounding(causal):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, 200, 32, generator=generator) for _ in range(3)]
    rounded = [t.bfloat16().requires_grad_() for t in exact]
    bias = attention_bias(None, 200, 200, causal=causal, dtype=torch.bfloat16, device=torch.device("cpu"))
    blocks = query_blocks(None, 200, causal=causal, size=64)
    ours = blocked_attention(*rounded, bias, blocks, 32**-0.5).transpose(1, 2).float()
    wide = [t.detach().double() for t in rounded]
    theirs = (32**-0.5 * wide[0] @ wide[1].transpose(2, 3) + bias.double()).softmax(-1) @ wide[2]
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


def test_a_cache_shifts_the_queries_to_the_end():
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    layout = document_layout(ids, None)
    whole = attention_bias(layout, 5, 5, causal=True, dtype=torch.float32, device=ids.device)
    tail = attention_bias(layout, 2, 5, causal=True, dtype=torch.float32, device=ids.device)
    assert torch.equal(whole[:, :, 3:], tail)
