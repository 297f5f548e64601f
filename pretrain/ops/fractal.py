"""Attention whose logits are enriched by how alike rows attend ("fractal", section 3.3 of the Spectra specification).

For logits A [.., S, S] a round adds w times the rows of G = A A^T, each brought to length 1: query i is pulled to keys
whose own rows look like row i. Self-attention only. Padding stands outside: rows and columns of padded tokens are
zeroed before the product, so that a text gives the same with and without padding.

One round needs no S x S product at all. With padded rows of Q and K zeroed (~), C = K~^T K~ and R = Q~^T Q~,

    G_ij = u_i . q~_j,   u_i = C q~_i / d,   |G_i|^2 = u_i^T R u_i,
    A_ij = [q_i / sqrt(d) ; w u_i / |G_i|] . [k_j ; q~_j],

an ordinary attention of twice the head width: any fused kernel takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.precision import wide, without_autocast

NORM_FLOOR = 1e-6
PADDING_PENALTY = -1e4
"""What the compat arithmetic adds to the logits of padded keys, before the rounds."""


class Visibility(NamedTuple):
    """Which tokens are real, and which belong together."""

    real: Tensor | None
    """[B, S] bool, false at padding; None where every token is real."""
    together: Tensor | None
    """[B, S, S] bool, true for real tokens of one document; None where a row is one document."""

    def within(self) -> Tensor | None:
        """[B, 1, S, S] bool: pairs whose logits mean anything. None: all of them."""
        if self.together is not None:
            return self.together[:, None]
        return None if self.real is None else (self.real[:, None, :, None] & self.real[:, None, None, :])

    def keys(self) -> Tensor | None:
        """[B, 1, 1 or S, S] bool: keys that each query may see. None: all of them."""
        if self.together is not None:
            return self.together[:, None]
        return None if self.real is None else self.real[:, None, None, :]


def enriched(logits: Tensor, weights: Sequence[Tensor], within: Tensor | None) -> Tensor:
    """`logits` [B, nh, S, S] after one round for each weight (a scalar tensor each); `within` as in `Visibility`."""
    for weight in weights:
        seen = logits if within is None else logits.masked_fill(~within, 0)
        gram = seen @ seen.mT
        logits = logits + weight * gram / gram.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    return logits


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, weights: Sequence[Tensor], visibility: Visibility,
                       *, penalty_first: bool = False) -> Tensor:
    """Attention [B, nh, S, d] with all logits written out, in fp32 from logits to probabilities.

    Args:
        query, key, value: [B, nh, S, d].
        weights: one scalar tensor a round.
        visibility: of the texts.
        penalty_first: the compat arithmetic: hidden keys are pushed down by 1e4 before the rounds, and nothing is
            zeroed. On padded text every Gram row is then the same constant; in fp16 it overflows.
    """
    with without_autocast(query):
        logits = wide(query) @ wide(key).mT / query.shape[-1] ** 0.5
        keys = visibility.keys()
        if penalty_first:
            if keys is not None:
                logits = logits + PADDING_PENALTY * (~keys).to(logits.dtype)
            logits = enriched(logits, weights, None)
        else:
            logits = enriched(logits, weights, visibility.within())
            if keys is not None:
                logits = logits.masked_fill(~keys, torch.finfo(logits.dtype).min)
        return logits.softmax(-1).to(value.dtype) @ value


def fused_features(query: Tensor, key: Tensor, weight: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Q', K') [B, nh, S, 2d] whose products are the logits after one round; see the head of this module.

    C, R and the norms are fp32, the features come back in the dtype of `query`.
    """
    hidden = query if real is None else query * real[:, None, :, None].to(query.dtype)
    direction: Tensor = _Direction.apply(query, key, weight, real)
    return torch.cat([query / query.shape[-1] ** 0.5, direction], -1), torch.cat([key, hidden], -1)


def _direction(query: Tensor, key: Tensor, weight: Tensor, real: Tensor | None) -> Tensor:
    """w u / |G| [B, nh, S, d]."""
    with without_autocast(query):
        q, k = wide(query), wide(key)
        if real is not None:
            q, k = (t * real[:, None, :, None].to(t.dtype) for t in (q, k))
        u = q @ (k.mT @ k) / q.shape[-1]
        squared = ((u @ (q.mT @ q)) * u).sum(-1, keepdim=True)
        return (weight * u / squared.clamp_min(NORM_FLOOR**2).sqrt()).to(query.dtype)


class _Direction(torch.autograd.Function):
    """`_direction`, computed again in the backward pass: its fp32 steps would be a third of a block's activations."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, weight: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, weight, real)
        return _direction(query, key, weight, real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, real = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_(needed)
                  for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)]
        with torch.enable_grad():
            result = _direction(inputs[0], inputs[1], inputs[2], real)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, grads[0]))
        return (*(next(found) if tensor.requires_grad else None for tensor in inputs), None)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, visibility: Visibility, *,
                    written_out: bool = False) -> Tensor:
    """Attention [B, nh, S, d] with at most one round, in torch's fused kernels.

    Args:
        query, key, value: [B, nh, S, d].
        weight: scalar tensor of the round; None: plain attention.
        visibility: of the texts; documents inside a row are for `explicit_attention`.
        written_out: as two products instead of a kernel, so that operations can be counted.
    """
    if visibility.together is not None:
        raise ValueError("fused attention takes one text a row; use the explicit form for documents inside a row")
    width, real = value.shape[-1], visibility.real
    if weight is None:
        query = query / query.shape[-1] ** 0.5
    else:
        query, key = fused_features(query, key, weight, real)
    bias = None
    if real is not None:
        # Half of the smallest number: kernels scale biases, and -inf in all of a row would make it no number.
        lowest = torch.finfo(query.dtype).min / 2
        bias = torch.zeros(real.shape, dtype=query.dtype, device=query.device).masked_fill(~real, lowest)[:, None, None]
    if written_out:
        logits = wide(query) @ wide(key).mT
        return (logits if bias is None else logits + bias).softmax(-1).to(value.dtype) @ value
    # Kernels want values as wide as the queries; the zero columns are cut off again.
    padded = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, padded, attn_mask=bias, scale=1.0)[..., :width]
