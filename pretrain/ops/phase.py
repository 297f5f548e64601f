"""Rotation of channel pairs, and short causal sums over rotated tokens.

Channels are paired by halves: x = (a, b, tail) with a = x[..., :H], b = x[..., H:2H], H = D // 2; z = a + ib turns by
e^{i angle}, an odd last channel stays. Rotation keeps norms, and rotating by -angle undoes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """R(angle) x for x [..., D] and angles that broadcast to [..., H]. Angles may be wider than x in dtype."""
    return x * _main(angles.cos().to(x.dtype), x) + half_swap(x) * _cross(angles.sin().to(x.dtype), x)


def half_swap(x: Tensor) -> Tensor:
    """(a, b, tail) -> (b, a, tail)."""
    half = x.shape[-1] // 2
    return torch.cat([x[..., half:2 * half], x[..., :half], x[..., 2 * half:]], -1)


def causal_taps(x: Tensor, taps: Tensor, *, before: Tensor | None = None, reach: Tensor | None = None) -> Tensor:
    """y_t = sum over l < k of taps_l x_{t-l}: a causal convolution of each channel.

    Args:
        x: [B, T, D].
        taps: [k, ...], each of which broadcasts to [B, T, D].
        before: [B, k-1, D], the inputs before x (`last_inputs` of the call before); None: zeros.
        reach: [B, T], how many tokens back each may look (its position in its document); None: as far as there are.
    """
    count, length = taps.shape[0], x.shape[1]
    past = x.new_zeros(x.shape[0], count - 1, x.shape[2]) if before is None else before.to(x.dtype)
    padded = torch.cat([past, x], 1)
    total = x * taps[0]
    for back in range(1, count):
        # In this order the backward pass keeps views of x and the small factors, nothing of x's size a tap.
        earlier = padded[:, count - 1 - back:count - 1 - back + length] * taps[back]
        total = total + (earlier if reach is None else earlier * (reach >= back).to(x.dtype)[..., None])
    return total


def last_inputs(x: Tensor, before: Tensor | None, count: int) -> Tensor:
    """[B, count, D]: what to give as `before` to the next call; zeros where there is less."""
    past = x.new_zeros(x.shape[0], count, x.shape[2]) if before is None else before.to(x.dtype)
    return torch.cat([past, x], 1)[:, x.shape[1] + past.shape[1] - count:]


def phase_taps(x: Tensor, angles: Tensor, weights: Tensor, *, before: Tensor | None = None,
               reach: Tensor | None = None) -> Tensor:
    """y_t = sum over l < k of weights_l R(angles_l) x_{t-l}; gradients go to x and `before` alone.

    Args:
        x, before, reach: as in `causal_taps`.
        angles: [k, ...], each broadcasts to [B, T, H].
        weights: [k].
    """
    weights = weights.to(x.dtype)
    shaped = weights.view(-1, *[1] * (angles.ndim - 1))
    cos, sin = shaped * angles.cos().to(x.dtype), shaped * angles.sin().to(x.dtype)
    offset = 0 if before is None else len(weights) - 1
    padded = x if before is None else torch.cat([before.to(x.dtype), x], 1)
    found: Tensor = _PhaseTaps.apply(padded, cos, sin, weights, reach, offset)
    return found


class _PhaseTaps(torch.autograd.Function):
    """The sum tap by tap, in place. It is linear, so the backward pass keeps the small factors and nothing else."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, reach: Tensor | None, offset: int
                ) -> Tensor:
        ctx.save_for_backward(cos, sin, weights, reach)
        ctx.offset = offset
        y = padded.new_zeros(padded.shape[0], padded.shape[1] - offset, padded.shape[2])
        for back in range(len(weights)):
            into, source = _rows(y, padded, back, offset)
            _add_turned(into, source, cos, sin, weights, reach, back, offset, sign=1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, weights, reach = ctx.saved_tensors
        found = grad.new_zeros(grad.shape[0], grad.shape[1] + ctx.offset, grad.shape[2])
        for back in range(len(weights)):
            source, into = _rows(grad, found, back, ctx.offset)
            _add_turned(into, source, cos, sin, weights, reach, back, ctx.offset, sign=-1)
        return found, None, None, None, None, None


def _add_turned(into: Tensor, source: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, reach: Tensor | None,
                back: int, offset: int, *, sign: int) -> None:
    """Add what one tap makes of `source`, turned forwards or (sign -1) backwards."""
    if reach is not None:
        source = source * _reached(reach, back, offset).to(source.dtype)
    (c, s), (a, b, tail) = _factors(cos, sin, back, offset), _halves(source)
    into_a, into_b, into_tail = _halves(into)
    into_a.addcmul_(c, a).addcmul_(s, b, value=-sign)
    into_b.addcmul_(s, a, value=sign).addcmul_(c, b)
    into_tail.addcmul_(weights[back], tail)


def _rows(y: Tensor, padded: Tensor, back: int, offset: int) -> tuple[Tensor, Tensor]:
    """(outputs that have an input `back` tokens earlier, those inputs)."""
    first = max(0, back - offset)
    return y[:, first:], padded[:, first + offset - back:padded.shape[1] - back]


def _reached(reach: Tensor, back: int, offset: int) -> Tensor:
    """[B, T', 1]: which of these outputs may look so far back."""
    return (reach[:, max(0, back - offset):] >= back)[..., None]


def _factors(cos: Tensor, sin: Tensor, back: int, offset: int) -> tuple[Tensor, Tensor]:
    """A tap's factors for these outputs, which broadcast to [B, T', H]."""
    first = max(0, back - offset)
    c, s = cos[back], sin[back]
    return (c[..., first:, :], s[..., first:, :]) if c.ndim > 1 and c.shape[-2] > 1 else (c, s)


def _halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = (a, b, tail)."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:2 * half], x[..., 2 * half:]


def _main(cos: Tensor, x: Tensor) -> Tensor:
    """Factors of x itself, [..., 1 or H] -> [..., D]; 1 for an odd last channel."""
    half = x.shape[-1] // 2
    cos = cos.expand(*cos.shape[:-1], half)
    return torch.cat([cos, cos, torch.ones_like(cos[..., :x.shape[-1] - 2 * half])], -1)


def _cross(sin: Tensor, x: Tensor) -> Tensor:
    """Factors of the swapped x; 0 for an odd last channel."""
    half = x.shape[-1] // 2
    sin = sin.expand(*sin.shape[:-1], half)
    return torch.cat([-sin, sin, torch.zeros_like(sin[..., :x.shape[-1] - 2 * half])], -1)
