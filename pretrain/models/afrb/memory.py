"""Resonant associative memory: a matrix of (address, token) pairs, addressed by a short trace of turned tokens.

    u_t = whitened input row of x_t            e_t = W_k u_t
    a_t = normalise(sum over l < k of decay^l R(l Theta) e_{t-l})      the address
    S_t = lambda S_{t-1} + g_t k_t v_t^T       k_t = a_{t-1}, v_t = W_v (whitened output row of x_t)
    r_t = S_t^T a_t                            logits += s (w_y - mean) . C^{-1/2} P r_t/|r_t| / |C^{-1/2} (w_y - mean)|

Linear attention over tokens whose state does not grow: no softmax, no stored trace. The key of a needle, met again,
gives the address at which its next token was written; with that token the address moves on. The tables are the
backbone's, frozen, so they are whitened once (`whiten_tables`). Decoding keeps S and the last k-1 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.afrb.counts import FADE_RANK, key_width
from pretrain.models.afrb.phase import Scalar, Tokens, WriteGate, exact, frequencies, masked, tap_angles
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.ops.associative_memory import delta_corrections, fading, final_state, read_all, read_rows, wide
from pretrain.ops.gated_memory import read_gated
from pretrain.ops.phase import causal_taps, last_inputs, phase_taps, rotate

_RIDGE = 1e-3
"""Added to the variance of each direction of a table, over the mean variance."""
_SEED = 20240229
"""Of the random phases: part of the architecture, not of a run."""


class MatrixState(NamedTuple):
    """What decoding goes on from."""

    matrix: Tensor
    """[B, K, V]: S."""
    embedded: Tensor
    """[B, k-1, dk or 2 dk]: e of the last tokens, for queries of their own beside it."""
    written_at: Tensor
    """[B, K]: address of the last token, at which the next one is written."""
    gate_inputs: Tensor | None
    """[B, k-1, C]: what the write gate saw last."""
    anchor: Tensor | None
    """[B, dk]: where the stepped read head started."""
    steps: Tensor | None
    """[B] int64: rows read since then."""


class ReadHead(NamedTuple):
    """What is asked at R rows [B, R, dk], and how a stepped head goes on."""

    address: Tensor
    anchor: Tensor | None
    steps: Tensor | None


class MatrixOutput(NamedTuple):
    """What a memory says at R rows."""

    whitened: Tensor
    """[B, R, D] fp32: P r / |r|, to be compared with whitened output rows."""
    logit_vector: Tensor
    """[B, R, D] fp32: s C^{-1/2} P r / |r|, whose products with output rows are logits."""
    features: Tensor
    """[B, R, dv] fp32: r / |r|."""
    state: MatrixState | None
    share: Tensor | None
    """[B, T, 1]: how much of each token is written; None: all of every one."""


class Whitening(nn.Module):
    """x -> C^{-1/2} (x - mean) for the rows of a frozen table; the identity until it is set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("root", torch.eye(width, dtype=torch.float32))

    def forward(self, rows: Tensor) -> Tensor:
        """Whitened rows [..., D], in fp32 or wider."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return (rows - self.mean) @ self.root.to(rows.dtype)

    def back(self, vectors: Tensor) -> Tensor:
        """C^{-1/2} v: its products with centred rows are those of v with whitened ones."""
        return vectors @ self.root.to(vectors.dtype)

    @torch.no_grad()
    def fit(self, blocks: Callable[[], Iterable[Tensor]]) -> None:
        """Take mean and covariance of a table [V, D], given in blocks of rows, which are asked for twice."""
        device = torch.device("cpu") if self.mean.device.type == "mps" else self.mean.device
        width, count = len(self.mean), 0
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        for rows in blocks():
            mean += rows.to(device, torch.float64).sum(0)
            count += len(rows)
        mean /= count
        covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
        for rows in blocks():
            centred = rows.to(device, torch.float64) - mean
            covariance += centred.T @ centred / count
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean()
        self.mean.copy_(mean)
        self.root.copy_((vectors * values.rsqrt()) @ vectors.T)


class ContentPhases(nn.Module):
    """Random Fourier features of an address, phases that content turns; products are exp(-sigma^2 |a - b|^2 / 2)."""

    def __init__(self, width: int, count: int, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.register_buffer("directions", torch.empty(count, width, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """The same directions for every model of this size."""
        drawn = torch.randn(self.directions.shape, generator=torch.Generator().manual_seed(_SEED))
        self.directions.copy_(self.sigma * drawn)

    def forward(self, address: Tensor) -> Tensor:
        """[..., dk] -> [..., 2 M]."""
        phases = address @ self.directions.to(address.dtype).T
        return torch.cat([phases.cos(), phases.sin()], -1) / math.sqrt(self.directions.shape[0])


class ContentDecay(nn.Module):
    """Log decay of each row of the state, log(sigmoid(U D u + b)) / 16: gated linear attention, arXiv:2312.06635.

    U starts at 0 and b so high that little is forgotten.
    """

    def __init__(self, cfg: AFRBConfig) -> None:
        super().__init__()
        self.start = cfg.pvm_fade_init
        self.down = nn.Parameter(torch.empty(FADE_RANK, cfg.hidden_size))
        self.up = nn.Parameter(torch.empty(key_width(cfg), FADE_RANK))
        self.bias = nn.Parameter(torch.empty(key_width(cfg)))

    def reset_parameters(self) -> None:
        """Every row fades alike."""
        _normal(self.down)
        nn.init.zeros_(self.up)
        nn.init.constant_(self.bias, self.start)

    def forward(self, u: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, K], at most 0."""
        return F.logsigmoid(u @ self.down.to(u.dtype).T @ self.up.to(u.dtype).T + self.bias.to(u.dtype)) / 16


class MatrixMemory(nn.Module):
    """See the module's docstring. Arithmetic in fp32, fp64 where the tables are."""

    def __init__(self, cfg: AFRBConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width, dk, dv = cfg.hidden_size, cfg.pvm_dk, cfg.pvm_dv
        self.key = nn.Parameter(torch.empty(dk, width))
        self.query = nn.Parameter(torch.empty(dk, width)) if cfg.pvm_separate_query else None
        self.value = nn.Parameter(torch.empty(dv, width))
        self.project = nn.Parameter(torch.empty(width, dv))
        learned = cfg.pvm_phase_clock == "learned"
        self.taps = nn.Parameter(torch.empty(cfg.pvm_address_taps, dk)) if learned else None
        self.log_scale = Scalar(math.log(cfg.pvm_scale or 1.0))
        self.gate = WriteGate.of(cfg, width)
        self.fade = ContentDecay(cfg) if cfg.pvm_rule == "gated" else None
        content = cfg.pvm_phase_clock == "content"
        self.phases = ContentPhases(dk, cfg.pvm_content_frequencies, cfg.pvm_content_sigma) if content else None
        self.register_buffer("turn", frequencies(cfg.pvm_omega_mode, dk, cfg.omega))
        self.register_buffer("tap_weights", cfg.pvm_address_decay ** torch.arange(cfg.pvm_address_taps,
                                                                                 dtype=torch.float32))
        self.input_rows, self.output_rows = Whitening(width), Whitening(width)
        self.register_buffer("inverse_norms", torch.ones(cfg.vocab_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Structured: orthogonal maps, and P the transpose of W_v, so that what is stored can be read at once."""
        draw = nn.init.orthogonal_ if self.cfg.pvm_init == "structured" else _normal
        for weight in (self.key, self.query, self.value):
            if weight is not None:
                draw(weight)
        if self.cfg.pvm_init == "structured":
            self.project.copy_(self.value.T)
            if self.query is not None:
                self.query.copy_(self.key)
        else:
            _normal(self.project)
        if self.taps is not None:
            nn.init.normal_(self.taps)

    def forward(self, input_rows: Tensor, output_rows: Tensor, tokens: Tokens, rows: Tensor | None,
                state: MatrixState | None, controls: Mapping[str, float], *, keep_state: bool) -> MatrixOutput:
        """Write T tokens and read at R of them.

        Args:
            input_rows, output_rows: [B, T, D] of the tokens, as the tables have them.
            tokens: where they stand.
            rows: [B, R] which of the T tokens read; None: all.
            state: of the call before; None at the beginning.
            controls: `memory_zero` 1 reads from an empty memory, `phase_freeze` 1 keeps the read head where it started,
                `pvm2emb_trained` 0 freezes P.
            keep_state: also return the state after the last token.
        """
        with exact(input_rows.device):
            u = self._unit(self.input_rows(input_rows))
            embedded = u @ torch.cat([w for w in (self.key, self.query) if w is not None]).to(u.dtype).T
            address, asked = self._addresses(embedded, tokens, None if state is None else state.embedded)
            features = self._features(address)
            keys = self._keys(features, tokens, state)
            values, (share, seen) = self._values(output_rows), self._share(u, tokens, state)
            if share is not None and self.cfg.pvm_rule != "delta":
                values = values * share
            first = None if state is None else state.matrix
            head = self._read_head(asked, tokens, rows, state, controls.get("phase_freeze", 0.0))
            queries = self._features(head.address)
            if self.fade is not None:
                reads, matrix = self._read_fading(queries, rows, keys, values, self.fade(u), tokens, first)
            else:
                reads, matrix = self._read(queries, rows, keys, values, share, tokens, first, keep_state=keep_state)
            after = None
            if keep_state and matrix is not None:
                after = self._after(matrix, embedded, features, seen, head, state)
            return self._say(reads, controls, after, share)

    def _read(self, queries: Tensor, rows: Tensor | None, keys: Tensor, values: Tensor, share: Tensor | None,
              tokens: Tokens, first: Tensor | None, *, keep_state: bool) -> tuple[Tensor, Tensor | None]:
        """Rules hebb and delta: (what is found, the state after the last token where it is kept)."""
        batch, length = values.shape[:2]
        fades = fading(batch, length, self.cfg.pvm_beta, resets=tokens.resets, mask=tokens.real, device=values.device)
        if self.cfg.pvm_rule == "delta":
            rate = self.cfg.pvm_delta_rate * (1.0 if share is None else share[..., 0])
            values = delta_corrections(keys, values, rate, fades, first)
        if rows is None:
            return read_all(queries, keys, values, fades, first)
        return (read_rows(queries, rows, keys, values, fades, first),
                final_state(keys, values, fades, first) if keep_state else None)

    def _read_fading(self, queries: Tensor, rows: Tensor | None, keys: Tensor, values: Tensor, log_decay: Tensor,
                     tokens: Tokens, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rule gated. Every chunk's state is formed, so single rows are read as all are."""
        every = queries
        if rows is not None:
            places = rows[..., None].expand(-1, -1, queries.shape[-1])
            every = torch.zeros_like(keys).scatter(1, places, queries.to(keys.dtype))
        reads, matrix = read_gated(every, keys, values, log_decay, resets=tokens.resets, mask=tokens.real,
                                   initial=first)
        if rows is not None:
            reads = reads.gather(1, rows[..., None].expand(-1, -1, reads.shape[-1]))
        return reads, matrix

    def _unit(self, rows: Tensor) -> Tensor:
        """Rows at norm sqrt(D)."""
        return F.normalize(rows, dim=-1) * math.sqrt(rows.shape[-1])

    def _addresses(self, embedded: Tensor, tokens: Tokens, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """(addresses [B, T, dk] at which is written, those that are asked for)."""
        cfg = self.cfg
        parts = embedded.split(cfg.pvm_dk, -1)
        past = [None, None] if before is None else before.split(cfg.pvm_dk, -1)
        address = self._trace(parts[0], tokens, past[0], cfg.pvm_address_taps)
        if self.query is None and cfg.query_taps == cfg.pvm_address_taps:
            return address, address
        return address, self._trace(parts[-1], tokens, past[-1], cfg.query_taps)

    def _trace(self, embedded: Tensor, tokens: Tokens, before: Tensor | None, taps: int) -> Tensor:
        """Normalised sum of the last `taps` tokens, each turned by how long ago it was."""
        if before is not None:
            before = before[:, before.shape[1] - (taps - 1):]
        if self.taps is not None:
            summed = causal_taps(embedded, self.taps[:taps].to(embedded.dtype), before=before, reach=tokens.reach)
        else:
            clock = "token" if self.cfg.pvm_phase_clock == "content" else self.cfg.pvm_phase_clock
            angles = tap_angles(clock, self.turn, taps, tokens.positions)
            summed = phase_taps(embedded, angles, self.tap_weights[:taps], before=before, reach=tokens.reach)
        return F.normalize(summed, dim=-1)

    def _features(self, address: Tensor) -> Tensor:
        """[..., dk] -> [..., K]."""
        return address if self.phases is None else self.phases(address)

    def _keys(self, features: Tensor, tokens: Tokens, state: MatrixState | None) -> Tensor:
        """Where each token is written: the address of the tokens before it; nowhere at the start of a document."""
        first = torch.zeros_like(features[:, :1]) if state is None else state.written_at[:, None].to(features.dtype)
        keys = torch.cat([first, features[:, :-1]], 1)
        return keys if tokens.resets is None else keys.masked_fill(tokens.resets[..., None], 0)

    def _values(self, output_rows: Tensor) -> Tensor:
        """What stands for each token in the memory [B, T, dv]."""
        rows = self.output_rows(output_rows)
        return (self._unit(rows) if self.cfg.pvm_row_norm else rows) @ self.value.to(rows.dtype).T

    def _share(self, u: Tensor, tokens: Tokens, state: MatrixState | None) -> tuple[Tensor | None, Tensor | None]:
        """(how much of each token is written [B, T, 1], 0 at padding; None: all of every one; the gate's channels).

        The delta rule takes it as a rate: of what is missing. A token that is not written then erases nothing.
        """
        if self.gate is None:
            return None if tokens.real is None else tokens.real[..., None].to(u.dtype), None
        share, seen = self.gate(u, tokens, None if state is None else state.gate_inputs)
        return share if tokens.real is None else share.masked_fill(~tokens.real[..., None], 0), seen

    def _read_head(self, asked: Tensor, tokens: Tokens, rows: Tensor | None, state: MatrixState | None,
                   frozen: float) -> ReadHead:
        """Addresses asked for at the rows.

        A stepped head starts from the address at the first row of a document and turns by one token's phase a row.
        """
        batch, length, width = asked.shape
        every = torch.arange(length, device=asked.device).expand(batch, length)
        places = every if rows is None else rows
        own = asked if rows is None else asked.gather(1, rows[..., None].expand(-1, -1, width))
        if self.cfg.pvm_read == "chain":
            return ReadHead(own, None, None)
        starts = torch.zeros_like(every) if tokens.starts is None else tokens.starts
        here = starts.gather(1, places)
        if rows is None:
            first = (here - tokens.past).clamp(min=0)
        else:
            first = (here[:, :, None] == here[:, None]).int().argmax(-1)
        anchor = own.gather(1, first[..., None].expand(-1, -1, width))
        step = torch.arange(places.shape[1], device=asked.device) - first
        if state is not None and state.anchor is not None and state.steps is not None:
            goes_on = here < tokens.past
            anchor = torch.where(goes_on[..., None], state.anchor[:, None].to(anchor.dtype), anchor)
            step = step + goes_on * state.steps[:, None]
        angles = (step * (1 - frozen))[..., None].to(wide(asked.device)) * self.turn.to(wide(asked.device))
        return ReadHead(rotate(anchor, angles), anchor[:, -1], step[:, -1] + 1)

    def _say(self, reads: Tensor, controls: Mapping[str, float], state: MatrixState | None,
             share: Tensor | None) -> MatrixOutput:
        features = F.normalize(reads * (1 - controls.get("memory_zero", 0.0)), dim=-1)
        project = masked(self.project, controls.get("pvm2emb_trained", 1.0)).to(features.dtype)
        whitened = features @ project.T
        scale = self.log_scale().exp().to(features.dtype)
        return MatrixOutput(whitened, scale * self.output_rows.back(whitened), features, state, share)

    def _after(self, matrix: Tensor, embedded: Tensor, features: Tensor, seen: Tensor | None, head: ReadHead,
               state: MatrixState | None) -> MatrixState:
        cfg = self.cfg
        past = None if state is None else state.embedded
        gate_inputs = None
        if seen is not None:
            gate_inputs = last_inputs(seen, None if state is None else state.gate_inputs, cfg.pvm_gate_taps - 1)
        return MatrixState(matrix, last_inputs(embedded, past, cfg.pvm_address_taps - 1), features[:, -1], gate_inputs,
                           head.anchor, head.steps)


def _normal(weight: Tensor) -> None:
    """Independent entries that keep norms on average."""
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
