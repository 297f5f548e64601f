"""Reading vector memories: query, weighting of states, and the map to the output table (spec, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.afrb.phase import Scalar, Tokens, exact, masked, pick
from pretrain.models.afrb.pvm import Trace
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.ops.phase import causal_taps, last_inputs, rotate

QUERY_CHUNK = 256
"""Rows whose weights over all states are alive at once."""
_MOVE_SCALE = 0.5
"""Temperature of the phase-weighted query."""


class ReadoutState(NamedTuple):
    """What decoding goes on from; grows with the sequence unless the readout is of the last state, or windowed."""

    hidden: Tensor
    """[B, w, D]: last hidden states, for the query."""
    traces: Tensor | None
    """[n, B, S, D]: states so far (the last K of a window)."""


class Weights(NamedTuple):
    """How the states are weighed, for diagnostics."""

    entropy: Tensor
    """[n, B, R]: over the logarithm of the number of visible states."""
    largest: Tensor
    """[n, B, R]: largest weight."""
    cosine: Tensor
    """[n, B, R]: largest cosine of query and state."""


class ReadoutOutput(NamedTuple):
    """What the memories say at R rows."""

    features: Tensor
    """[B, R, D] fp32: r at norm sqrt(D)."""
    vector: Tensor
    """[B, R, D]: P r, to be added to the hidden states."""
    state: ReadoutState | None
    weights: Weights | None


class QueryHead(nn.Module):
    """The bottleneck MLP of a learned query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = query_width(width)
        self.down, self.norm, self.up = nn.Linear(width, inner), nn.LayerNorm(inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, trained: float) -> Tensor:
        """[..., D] -> [..., D]; its gradients times `trained`."""
        x = self.up(F.gelu(self.norm(self.down(x))))
        return masked(x, trained)


def query_width(width: int) -> int:
    """Inner width of the learned query."""
    return max(1, width // 4)


class VectorReadout(nn.Module):
    """r_t from the states of all blocks, averaged over blocks, and e_t = P r_t."""

    def __init__(self, cfg: AFRBConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.hidden_size
        self.project = nn.Parameter(torch.empty(width, width))
        state = cfg.readout_mode == "state"
        self.log_tau = None if state else Scalar(math.log(cfg.readout_tau))
        self.turn_back = Scalar(0.0) if state else None
        self.query = QueryHead(width) if cfg.learned_query else None

    def reset_parameters(self) -> None:
        """P orthogonal."""
        nn.init.orthogonal_(self.project)

    def forward(self, hidden: Tensor, traces: Sequence[Trace], tokens: Tokens, rows: Tensor | None,
                state: ReadoutState | None, controls: Mapping[str, float], *, keep_state: bool,
                measure: bool = False) -> ReadoutOutput:
        """Read at R of the T tokens of this call.

        Args:
            hidden: [B, T, D] last hidden states.
            traces: states of each block's memory.
            tokens, rows, state, controls, keep_state: as in `MatrixMemory`; further, `query_trained` 0 freezes a
                learned query.
            measure: also tell how the states were weighed.
        """
        weights = None
        if self.turn_back is not None:
            read = torch.stack([self._turned_back(trace, rows) for trace in traces]).mean(0)
            after = ReadoutState(hidden[:, :0], None) if keep_state else None
        else:
            query = self._query(hidden, tokens, rows, state, controls)
            stored = torch.stack([t.states for t in traces])
            known = stored if state is None or state.traces is None else torch.cat([state.traces, stored], 2)
            read, weights = self._weigh(query, known, tokens, rows, measure=measure)
            after = self._after(hidden, known, state) if keep_state else None
        features = F.normalize(read, dim=-1) * math.sqrt(read.shape[-1])
        project = masked(self.project, controls.get("pvm2emb_trained", 1.0))
        return ReadoutOutput(features, features.to(project.dtype) @ project.T, after, weights)

    def _turned_back(self, trace: Trace, rows: Tensor | None) -> Tensor:
        """[B, R, D]: R(-theta - delta) m of one block at the rows."""
        assert self.turn_back is not None
        states, angles = trace
        if rows is not None:
            angles = pick(angles.expand(len(states), -1, -1), rows)
            states = pick(states, rows)
        return rotate(states, -(angles + self.turn_back().to(angles.dtype)))

    def _query(self, hidden: Tensor, tokens: Tokens, rows: Tensor | None, state: ReadoutState | None,
               controls: Mapping[str, float]) -> Tensor:
        """[B, R, D] fp32 of norm 1, from the last w hidden states of the document, this token's included."""
        window = self.cfg.readout_window
        h = hidden.float()
        past = h.new_zeros(h.shape[0], window, h.shape[2]) if state is None else state.hidden.float()
        reach = tokens.positions.expand(h.shape[:2])
        inside = torch.arange(window, device=h.device) <= reach[..., None]
        if self.cfg.needle_query_mode == "phase_weighted":
            scores = _moves(torch.cat([past, h], 1), reach) / _MOVE_SCALE
            share = scores.unfold(1, window, 1).flip(-1).masked_fill(~inside, -math.inf).softmax(-1)
        else:
            share = inside.float() / inside.sum(-1, keepdim=True)
        mean = _window_mean(h, past[:, 1:], share, rows)
        if self.query is not None:
            mean = self.query(mean.to(self.project.dtype), controls.get("query_trained", 1.0)).float()
        return F.normalize(mean, dim=-1)

    def _weigh(self, query: Tensor, known: Tensor, tokens: Tokens, rows: Tensor | None, *, measure: bool
               ) -> tuple[Tensor, Weights | None]:
        """r [B, R, D]: softmax over the visible states of cos(q, m) / tau, mean over blocks."""
        with exact(query.device):
            return self._weigh_exactly(query, known, tokens, rows, measure=measure)

    def _weigh_exactly(self, query: Tensor, known: Tensor, tokens: Tokens, rows: Tensor | None, *, measure: bool
                       ) -> tuple[Tensor, Weights | None]:
        assert self.log_tau is not None
        length = tokens.positions.shape[1]
        first = tokens.past + length - known.shape[2]  # a window's states begin later than the sequence
        states = torch.arange(first, first + known.shape[2], device=query.device)
        at = torch.arange(tokens.past, tokens.past + length, device=query.device).expand(query.shape[0], length)
        starts = torch.zeros_like(at) if tokens.starts is None else tokens.starts
        if rows is not None:
            at, starts = at.gather(1, rows), starts.gather(1, rows)
        directions = F.normalize(known, dim=-1)
        parts, measured = [], []
        for part in range(0, query.shape[1], QUERY_CHUNK):
            piece = slice(part, part + QUERY_CHUNK)
            here = at[:, piece, None]
            hidden = (states > here) | (states < starts[:, piece, None])
            if self.cfg.history is not None:
                hidden = hidden | (states <= here - self.cfg.history)
            cosines = query[:, piece] @ directions.transpose(-1, -2)
            scores = (cosines * (-self.log_tau()).exp()).masked_fill(hidden, -math.inf)
            if self.cfg.readout_topk and self.cfg.readout_topk < scores.shape[-1]:
                least = scores.topk(self.cfg.readout_topk, -1).values[..., -1:]
                scores = scores.masked_fill(scores < least, -math.inf)
            weights = scores.softmax(-1)
            parts.append((weights @ known).mean(0))
            if measure:
                measured.append(_measure(weights, cosines.masked_fill(hidden, -1.0), ~hidden))
        joined = Weights(*(torch.cat(x, -1) for x in zip(*measured, strict=True))) if measure else None
        return torch.cat(parts, 1), joined

    def _after(self, hidden: Tensor, known: Tensor, state: ReadoutState | None) -> ReadoutState:
        kept = known if self.cfg.history is None else known[:, :, -self.cfg.history:]
        past = None if state is None else state.hidden
        return ReadoutState(last_inputs(hidden, past, self.cfg.readout_window), kept)


def _moves(h: Tensor, reach: Tensor) -> Tensor:
    """[B, w - 1 + T] of h [B, w + T, D]: how far the state moved into each of its tokens, from the second on.

    Nothing before a document's first token counts. `reach` [B, T] tells how far back the document of each of the last
    T tokens goes, and so of the tokens before them.
    """
    moved = (h[:, 1:] - h[:, :-1]).norm(dim=-1)
    before = moved.shape[1] - reach.shape[1]
    back = torch.arange(before, 0, -1, device=h.device)
    return moved * (torch.cat([reach[:, :1] - back, reach], 1) > 0)


def _window_mean(h: Tensor, past: Tensor, share: Tensor, rows: Tensor | None) -> Tensor:
    """sum over l < w of share[..., l] h_{t-l}, at all tokens or at rows; past [B, w-1, D], share [B, T, w]."""
    if rows is None:
        return causal_taps(h, share.permute(2, 0, 1)[..., None], before=past)
    window = share.shape[-1]
    places = rows[..., None] + (window - 1) - torch.arange(window, device=rows.device)
    batch = torch.arange(len(h), device=h.device)[:, None, None]
    return (torch.cat([past, h], 1)[batch, places] * pick(share, rows)[..., None]).sum(2)


@torch.no_grad()
def _measure(weights: Tensor, cosines: Tensor, visible: Tensor) -> Weights:
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    most = visible.sum(-1).clamp(min=2).log()
    return Weights(entropy / most, weights.amax(-1), cosines.amax(-1))
