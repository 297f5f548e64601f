"""A matrix memory: S_t = lambda_t S_{t-1} + k_t v_t^T, read as r_t = S_t^T q_t. Linear attention without a softmax.

Unrolled, r_t = sum over s <= t of (lambda_{s+1} ... lambda_t) (q_t . k_s) v_s. Where only a few rows are wanted, that
sum is a product with an [R, T] matrix and the states are never formed (`read_rows`); where all are, chunks of tokens
are summed so and linked by the states at their ends, which are a linear recurrence over chunks (`read_all`). The delta
rule S_t = lambda_t S_{t-1} + k_t eta_t (v_t - lambda_t S_{t-1}^T k_t)^T writes what is missing instead of the value;
once its corrections are known, it is read like any other memory (`delta_corrections`; the triangular form of
arXiv:2406.06484, gated as in arXiv:2412.06464).

Everything runs in fp32 (fp64 where keys are).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.ops.linear_recurrence import linear_recurrence

CHUNK = 64
"""Tokens a chunk where all rows are read."""


class Fading(NamedTuple):
    """What becomes of a write between its token and a later one."""

    logs: Tensor | None
    """[B, T]: sum of log lambda up to and with each token; None: nothing decays."""
    segments: Tensor
    """[B, T] int64: number of resets up to and with each token."""

    def at(self, rows: Tensor) -> Fading:
        """Of the tokens `rows` [B, R]."""
        return Fading(None if self.logs is None else self.logs.gather(1, rows), self.segments.gather(1, rows))

    def since(self, before: Fading, dtype: torch.dtype) -> Tensor:
        """[B, R, T]: what is left at each of these tokens of what was written at each of `before`, an earlier one."""
        same = self.segments[:, :, None] == before.segments[:, None]
        if self.logs is None or before.logs is None:
            return same.to(dtype)
        return torch.where(same, (self.logs[:, :, None] - before.logs[:, None]).clamp(max=0).exp().to(dtype), 0)

    def since_start(self, dtype: torch.dtype) -> Tensor:
        """[B, T, 1]: what is left of the state before the first token."""
        left = (self.segments == 0).to(dtype)
        return (left if self.logs is None else left * self.logs.exp().to(dtype))[..., None]


def fading(batch: int, length: int, decay: float | Tensor, *, resets: Tensor | None = None, mask: Tensor | None = None,
           device: torch.device | None = None) -> Fading:
    """Bookkeeping of a memory over [B, T] tokens.

    Args:
        batch, length: B and T.
        decay: lambda in (0, 1], one number or [B, T].
        resets: [B, T] True where a document begins.
        mask: [B, T] 0 at padding, which does not decay (that it does not write is the caller's part: zero values).
        device: of the result.
    """
    segments = resets_so_far(batch, length, resets, mask, device)
    if not isinstance(decay, Tensor) and decay == 1:
        return Fading(None, segments)
    logs = torch.as_tensor(decay, dtype=wide(segments.device), device=device).log().expand(batch, length)
    if mask is not None:
        logs = torch.where(mask.bool(), logs, 0)
    return Fading(logs.cumsum(1), segments)


def resets_so_far(batch: int, length: int, resets: Tensor | None, mask: Tensor | None, device: torch.device | None
                  ) -> Tensor:
    """[B, T] int64: number of resets up to and with each token, those at padding left out."""
    if resets is None:
        return torch.zeros(batch, length, dtype=torch.int64, device=device)
    return (resets if mask is None else resets & mask.bool()).long().cumsum(1)


def wide(device: torch.device) -> torch.dtype:
    """The widest float of a device: sums of logarithms and angles lose their small parts in fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


def read_rows(queries: Tensor, rows: Tensor, keys: Tensor, values: Tensor, fades: Fading,
              initial: Tensor | None = None) -> Tensor:
    """r [B, R, V] of queries [B, R, K] that stand at the tokens `rows` [B, R].

    Args:
        queries, rows: what is asked, and where; a row sees writes at its own token and before.
        keys: [B, T, K].
        values: [B, T, V], 0 at padding.
        fades: of the T tokens.
        initial: [B, K, V], the state before the first token; None: zero.
    """
    q, k, v = in_one_dtype(queries, keys, values)
    here = fades.at(rows)
    seen = rows[:, :, None] >= torch.arange(k.shape[1], device=rows.device)
    weights = (q @ k.transpose(1, 2)) * here.since(fades, k.dtype) * seen.to(k.dtype)
    reads = weights @ v
    if initial is not None:
        reads = reads + here.since_start(k.dtype) * (q @ initial.to(k.dtype))
    return reads


def final_state(keys: Tensor, values: Tensor, fades: Fading, initial: Tensor | None = None) -> Tensor:
    """S [B, K, V] after the last token."""
    _, k, v = in_one_dtype(keys, keys, values)
    last = torch.full_like(fades.segments[:, :1], k.shape[1] - 1)
    end = fades.at(last)
    state = k.transpose(1, 2) @ (end.since(fades, k.dtype).transpose(1, 2) * v)
    if initial is not None:
        state = state + end.since_start(k.dtype) * initial.to(k.dtype)
    return state


def read_all(queries: Tensor, keys: Tensor, values: Tensor, fades: Fading, initial: Tensor | None = None,
             chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(r [B, T, V], S [B, K, V] after the last token) of queries [B, T, K] at every token."""
    q, k, v = in_one_dtype(queries, keys, values)
    batch, length, width = v.shape
    size = min(chunk, length)
    count = -(-length // size)
    q, k, v = (cut(x, count, size) for x in (q, k, v))
    inside = Fading(None if fades.logs is None else cut(fades.logs, count, size, repeat=True),
                    cut(fades.segments, count, size, repeat=True))
    earlier = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
    weights = (q @ k.transpose(1, 2)) * inside.since(inside, k.dtype) * earlier
    reads = (weights @ v).view(batch, count, size, width)
    # What each chunk adds to the state at its end, and what it leaves of the state at its beginning.
    last = Fading(None if inside.logs is None else inside.logs[:, -1:], inside.segments[:, -1:])
    added = k.transpose(1, 2) @ (last.since(inside, k.dtype).transpose(1, 2) * v)
    ends, starts = _before_chunks(fades, count, size)
    left = ends.since(starts, k.dtype).diagonal(dim1=1, dim2=2)
    entering, end = link_chunks(added.view(batch, count, -1, width), left, initial)
    begin = Fading(None if starts.logs is None else starts.logs.reshape(-1, 1), starts.segments.reshape(-1, 1))
    kept = inside.since(begin, k.dtype).view(batch, count, size, 1)
    reads = reads + kept * (q.view(batch, count, size, -1) @ entering)
    return reads.view(batch, -1, width)[:, :length], end


def link_chunks(added: Tensor, left: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states before each chunk [B, n, K, V], state after the last [B, K, V]).

    Args:
        added: [B, n, K, V], what each chunk adds to the state at its end.
        left: what it leaves of the state at its beginning, [B, n] or of each number [B, n, K * V].
        initial: [B, K, V], the state before the first chunk; None: zero.
    """
    first = None if initial is None else initial.to(added.dtype)
    states = linear_recurrence(added.flatten(2), left, initial=None if first is None else first.flatten(1)).states
    states = states.view(added.shape)
    start = torch.zeros_like(states[:, :1]) if first is None else first[:, None]
    return torch.cat([start, states[:, :-1]], 1), states[:, -1]


def delta_corrections(keys: Tensor, values: Tensor, rate: float | Tensor, fades: Fading,
                      initial: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """u [B, T, V]: what the delta rule writes in place of the values; read with the same keys.

    u_t = eta_t (v_t - lambda_t S_{t-1}^T k_t), solved for a chunk at a time.

    Args:
        keys, values, fades, initial: as in `read_all`. Keys of norm 1 keep it stable.
        rate: eta in (0, 1], one number or [B, T]; padding needs 0.
    """
    _, k, v = in_one_dtype(keys, keys, values)
    batch, length, width = v.shape
    eta = torch.as_tensor(rate, dtype=k.dtype, device=k.device).expand(batch, length)[..., None]
    state = k.new_zeros(batch, k.shape[2], width) if initial is None else initial.to(k.dtype)
    entered = Fading(None if fades.logs is None else torch.zeros_like(fades.logs[:, :1]),
                     torch.zeros_like(fades.segments[:, :1]))
    found = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        here = Fading(None if fades.logs is None else fades.logs[:, part], fades.segments[:, part])
        key, value = k[:, part], v[:, part]
        between = (eta[:, part] * (key @ key.transpose(1, 2)) * here.since(here, k.dtype)).tril(-1)
        wanted = eta[:, part] * (value - here.since(entered, k.dtype) * (key @ state))
        # The diagonal is taken as ones.
        found.append(torch.linalg.solve_triangular(between, wanted, upper=False, unitriangular=True))
        last = Fading(None if here.logs is None else here.logs[:, -1:], here.segments[:, -1:])
        state = (last.since(entered, k.dtype) * state
                 + key.transpose(1, 2) @ (last.since(here, k.dtype).transpose(1, 2) * found[-1]))
        entered = last
    return torch.cat(found, 1)


def in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """fp64 where one of them is, else fp32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def cut(x: Tensor, count: int, size: int, *, repeat: bool = False) -> Tensor:
    """[B, T, ...] -> [B * n, C, ...]; the last chunk is filled with zeros, or with its last token's value."""
    missing = count * size - x.shape[1]
    if missing:
        fill = x[:, -1:].expand(-1, missing, *x.shape[2:])
        x = torch.cat([x, fill if repeat else torch.zeros_like(fill)], 1)
    return x.reshape(x.shape[0] * count, size, *x.shape[2:])


def _before_chunks(fades: Fading, count: int, size: int) -> tuple[Fading, Fading]:
    """(at the last token of each chunk, at the token before each chunk), [B, n] each."""
    ends = [min((chunk + 1) * size, fades.segments.shape[1]) - 1 for chunk in range(count)]
    at_end = Fading(None if fades.logs is None else fades.logs[:, ends], fades.segments[:, ends])
    segments = torch.cat([torch.zeros_like(fades.segments[:, :1]), at_end.segments[:, :-1]], 1)
    if at_end.logs is None:
        return at_end, Fading(None, segments)
    return at_end, Fading(torch.cat([torch.zeros_like(at_end.logs[:, :1]), at_end.logs[:, :-1]], 1), segments)
