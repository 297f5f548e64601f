"""The first-order linear recurrence m_t = a_t m_{t-1} + w_t over whole sequences, without an operation for every token.

Steps compose, (a', w') after (a, w) = (a' a, a' w + w'), so T steps are cut into n chunks of C and taken in three
passes: what each chunk hands on when nothing enters it (C operations, each over all chunks at once), what truly enters
each (n operations over one row a chunk), and the states from there (C operations). With C near the square root of T
that is about 3 sqrt(T) operations on large tensors and O(T D) work for every form of decay. No quotients and no
logarithms: small decays do not overflow (cumsum(w b^-t) b^t does), and a decay of exactly 0, the boundary of a
document, is a number like any other. On a CPU its forward takes about the time of products with the [C, C] decay
matrices of all chunks, which know decays of tokens only (`benchmarks/recurrence.py`).

The backward pass is the same from the end: lambda_t = g_t + a_{t+1} lambda_{t+1}, dL/dw_t = lambda_t and
dL/da_t = lambda_t m_{t-1}. Only inputs and what enters each chunk are kept; states are computed again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 0.6
"""Tokens a chunk over sqrt(T): forward and backward take five passes over places in chunks and two over chunks."""


class Recurrence(NamedTuple):
    """States of a scan in fp32 (fp64 where an input is)."""

    states: Tensor
    """[B, T, D]: m_t."""
    final: Tensor
    """[B, D]: the state after the last token, to go on from."""


def linear_recurrence(inputs: Tensor, decay: Tensor | float, *, initial: Tensor | None = None,
                      resets: Tensor | None = None, mask: Tensor | None = None, chunk: int | None = None,
                      group: dist.ProcessGroup | None = None) -> Recurrence:
    """m_t = a_t m_{t-1} + w_t for t = 0..T-1, in fp32 (fp64 where an input is).

    Args:
        inputs: w, [B, T, D], T >= 1.
        decay: a; one number for all, [B, T] a factor a token, [D] one a channel, [B, T, D] one a token and channel
            (content-dependent decay, say). Any finite values; |a| <= 1 keeps states bounded.
        initial: m_{-1}, [B, D]; None: zero.
        resets: [B, T] True at the first token of a document: nothing from before reaches it, `initial` neither.
            Padding is no token: there a reset counts for nothing.
        mask: [B, T] 0 or False at padding, which neither writes nor decays: its state is that of the token before.
        chunk: tokens a chunk; None takes about sqrt(T).
        group: the sequence lies in consecutive parts on the ranks of this group, and everything above is this rank's
            part (`initial` counts on the first rank). Then the call is collective, forward and backward: each rank
            sends one [B, D] row and the product of its decays.
    """
    decay = torch.as_tensor(decay, device=inputs.device)
    wide = inputs.dtype == torch.float64 or (decay.dim() > 0 and decay.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    w, a = inputs.to(dtype), _by_token(decay.to(dtype), inputs)
    if mask is not None:
        real = mask.bool()[..., None]
        w, a = w.masked_fill(~real, 0), torch.where(real, a, 1)
    if resets is not None:
        first = resets if mask is None else resets & mask.bool()
        a = torch.where(first[..., None], 0, a)
    batch, length, width = w.shape
    begins = group is None or dist.get_rank(group) == 0
    first_state = initial.to(dtype) if initial is not None and begins else w.new_zeros(batch, width)
    size = max(1, min(length, chunk or round(_CHUNK * math.sqrt(length))))
    states: Tensor = _Scan.apply(w, a, first_state, size, group)
    return Recurrence(states, states[:, -1])


def _by_token(decay: Tensor, inputs: Tensor) -> Tensor:
    """Decay as [1 or B, T, 1 or D]."""
    batch, length, width = inputs.shape
    if decay.dim() == 0:
        return decay.expand(1, length, width)
    if decay.shape == (batch, length):
        return decay[..., None]
    if decay.shape == (width,):
        return decay.expand(1, length, width)
    if decay.shape == inputs.shape:
        return decay
    raise ValueError(f"decay has shape {tuple(decay.shape)}; for inputs [{batch}, {length}, {width}] it is a number, "
                     "[B, T], [D] or [B, T, D]")


class _Chunks:
    """T tokens as chunks of C, the last one perhaps shorter."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        self.count = -(-length // size)

    def at(self, place: int) -> tuple[slice, slice]:
        """(tokens at this place of every chunk, the chunks that have such a token)."""
        return slice(place, None, self.size), slice(0, -(-(self.length - place) // self.size))

    def products(self, decay: Tensor) -> Tensor:
        """[b, T, d] -> [b, n, d]: product of the decays of each chunk."""
        whole = self.length // self.size * self.size
        parts = [decay[:, :whole].unflatten(1, (-1, self.size)).prod(2)] if whole else []
        if whole < self.length:
            parts.append(decay[:, whole:].prod(1, keepdim=True))
        return torch.cat(parts, 1)


def _enter(handed_on: Tensor, products: Tensor, first: Tensor, group: dist.ProcessGroup | None, *,
           backwards: bool) -> Tensor:
    """[B, n, D]: what enters each chunk. Collective with a group.

    `handed_on` [B, n, D] is what a chunk hands on where nothing enters it, `products` [b, n, d] what becomes of one
    unit that enters, `first` [B, D] what enters the first chunk (the last, `backwards`).
    """
    order = list(range(handed_on.shape[1]))
    if backwards:
        order.reverse()
    entering = torch.empty_like(handed_on)

    def walk(value: Tensor) -> Tensor:
        for chunk in order:
            entering[:, chunk] = value
            value = torch.addcmul(handed_on[:, chunk], products[:, chunk], value)
        return value

    own = walk(first)
    if group is not None:
        walk(first + _from_other_ranks(own, products.prod(1), group, backwards=backwards))
    return entering


def _from_other_ranks(own: Tensor, product: Tensor, group: dist.ProcessGroup, *, backwards: bool) -> Tensor:
    """[B, D] that enters this rank's part, from what every rank hands on and the products of its decays. Collective."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sent = torch.cat([own, product.expand(own.shape[0], -1)], 1).contiguous()
    received = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(received, sent, group=group)
    value = torch.zeros_like(own)
    for other in range(world - 1, rank, -1) if backwards else range(rank):
        handed_on, shrink = received[other].split([own.shape[1], product.shape[1]], 1)
        value = torch.addcmul(handed_on, shrink, value)
    return value


class _Scan(torch.autograd.Function):
    """(w [B, T, D], a [1 or B, T, 1 or D], m_{-1} [B, D], C, group) -> m [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, initial: Tensor, size: int,
                group: dist.ProcessGroup | None) -> Tensor:
        batch, length, width = w.shape
        chunks = _Chunks(length, size)
        state = w.new_zeros(batch, chunks.count, width)
        for place in range(size):
            tokens, rows = chunks.at(place)
            torch.addcmul(w[:, tokens], a[:, tokens], state[:, rows], out=state[:, rows])
        entering = _enter(state, chunks.products(a), initial, group, backwards=False)
        states = torch.empty_like(w, memory_format=torch.contiguous_format)
        before = entering
        for place in range(size):
            tokens, rows = chunks.at(place)
            torch.addcmul(w[:, tokens], a[:, tokens], before[:, rows], out=states[:, tokens])
            before = states[:, tokens]
        ctx.save_for_backward(w, a, entering)
        ctx.size, ctx.group = size, group
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, a, entering = ctx.saved_tensors
        grad = grads[0]
        chunks = _Chunks(w.shape[1], ctx.size)
        # h is what a token hands back: its lambda times its decay.
        h = torch.zeros_like(entering)
        for place in reversed(range(ctx.size)):
            tokens, rows = chunks.at(place)
            h[:, rows].add_(grad[:, tokens]).mul_(a[:, tokens])
        h = _enter(h, chunks.products(a), torch.zeros_like(h[:, 0]), ctx.group, backwards=True)
        lambdas = torch.empty_like(w, memory_format=torch.contiguous_format)
        for place in reversed(range(ctx.size)):
            tokens, rows = chunks.at(place)
            torch.add(grad[:, tokens], h[:, rows], out=lambdas[:, tokens])
            torch.mul(lambdas[:, tokens], a[:, tokens], out=h[:, rows])
        grad_a = _grad_decay(w, a, entering, lambdas, chunks) if ctx.needs_input_grad[1] else None
        return lambdas, grad_a, h[:, 0], None, None


def _grad_decay(w: Tensor, a: Tensor, entering: Tensor, lambdas: Tensor, chunks: _Chunks) -> Tensor:
    """dL/da_t = lambda_t m_{t-1}, summed over what a is shared by; states are computed again, chunk by chunk."""
    grad = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    shared = [axis for axis in (0, 2) if a.shape[axis] < w.shape[axis]]
    before = entering.clone()
    for place in range(chunks.size):
        tokens, rows = chunks.at(place)
        product = lambdas[:, tokens] * before[:, rows]
        grad[:, tokens] = product.sum(shared, keepdim=True) if shared else product
        torch.addcmul(w[:, tokens], a[:, tokens], before[:, rows], out=before[:, rows])
    return grad
