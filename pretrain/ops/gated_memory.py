"""A matrix memory whose rows fade each at its own rate, which content sets: gated linear attention (arXiv:2312.06635).

    S_t = diag(exp(f_t)) S_{t-1} + k_t v_t^T        r_t = S_t^T q_t

Within a chunk the decay between two tokens parts into a factor of the query and one of the key, so that a chunk is two
products of matrices; chunks are linked by their states, which are a linear recurrence. The factor of the key grows with
the decay of the chunk, so a token's log decay is held to `FLOOR`: beyond it a chunk would leave fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.associative_memory import cut, in_one_dtype, link_chunks, resets_so_far

CHUNK = 16
"""Tokens a chunk."""
FLOOR = -5.0
"""Least log decay of a token: exp(-5) = 0.7% is kept. Over a chunk of 16 that is exp(80), and fp32 ends at exp(88)."""


def read_gated(queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, *, resets: Tensor | None = None,
               mask: Tensor | None = None, initial: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(r [B, T, V], S [B, K, V] after the last token), in fp32, fp64 where an input is.

    Args:
        queries, keys: [B, T, K].
        values: [B, T, V], 0 at padding.
        log_decay: f [B, T, K], at most 0; below `FLOOR` it is taken as that.
        resets: [B, T] True where a document begins, and nothing of before is seen.
        mask: [B, T] 0 at padding, which does not decay.
        initial: S before the first token; None: zero.
    """
    if chunk * FLOOR < -80:
        raise ValueError(f"chunk of {chunk} tokens: at most {int(-80 / FLOOR)}, or factors of keys leave fp32")
    q, k, v = in_one_dtype(queries, keys, values)
    batch, length, width = v.shape
    logs = log_decay.to(k.dtype).clamp(FLOOR, 0)
    if mask is not None:
        logs = logs.masked_fill(~mask.bool()[..., None], 0)
    segments = resets_so_far(batch, length, resets, mask, v.device)
    size = min(chunk, length)
    count = -(-length // size)
    # What the chunk before ended in decides whether its state is seen at all.
    before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, size - 1::size]], 1)[:, :count].reshape(-1, 1)
    q, k, v, logs = (cut(x, count, size) for x in (q, k, v, logs))
    inside, segments = logs.cumsum(1), cut(segments, count, size, repeat=True)
    asked = q * inside.exp()
    seen = (segments[:, :, None] == segments[:, None]).tril()
    reads = (asked @ (k * (-inside).exp()).transpose(1, 2) * seen) @ v
    end = inside[:, -1:]
    to_end = (segments == segments[:, -1:])[..., None]
    added = (k * (end - inside).exp() * to_end).transpose(1, 2) @ v
    left = (end.exp() * (segments[:, -1:] == before)[..., None]).transpose(1, 2).expand(-1, -1, width)
    entering, last = link_chunks(added.view(batch, count, -1, width), left.reshape(batch, count, -1), initial)
    reads = reads + (asked * (segments == before)[..., None]) @ entering.flatten(0, 1)
    return reads.view(batch, -1, width)[:, :length], last
