"""Rotation of channel pairs, and short causal sums over rotated tokens.

Channels are paired by halves: x = (a, b, tail) with a = x[..., :H], b = x[..., H:2H], H = D // 2; z = a + ib turns by
e^{i angle}, an odd last channel stays. Rotation keeps norms, and rotating by -angle undoes it.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """y_t = sum over l < k of weights_l R(angles_l) x_{t-l}.

    Args:
        x, before, reach: as in `causal_taps`.
        angles: [k, ...], each broadcasts to [B, T, H].
        weights: [k].
    """
    shaped = weights.to(x.dtype).view(-1, *[1] * (angles.ndim - 1))
    main, cross = _main(shaped * angles.cos().to(x.dtype), x), _cross(shaped * angles.sin().to(x.dtype), x)
    if x.shape[-1] % 2:
        main = torch.cat([main[..., :-1], shaped.expand(*main.shape[:-1], 1)], -1)
    past = None if before is None else half_swap(before)
    return causal_taps(x, main, before=before, reach=reach) + causal_taps(half_swap(x), cross, before=past, reach=reach)


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
