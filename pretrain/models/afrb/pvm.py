"""Phase vector memory: a decaying sum of rotated tokens, one vector a sequence (spec, section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.afrb.phase import Scalar, Tokens, WriteGate, clock_time, frequencies
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.ops.linear_recurrence import linear_recurrence
from pretrain.ops.phase import last_inputs, rotate


class VectorState(NamedTuple):
    """What decoding goes on from."""

    sum: Tensor
    """[B, D] fp32: the recurrence's last state."""
    gate_inputs: Tensor | None
    """[B, k-1, D]: what the write gate saw last."""


class Trace(NamedTuple):
    """States of one block's memory."""

    states: Tensor
    """[B, T, D] fp32: m_t."""
    angles: Tensor
    """[B or 1, T, 1 or H]: theta_p(t)."""


class VectorMemory(nn.Module):
    """m_t = beta_t m_{t-1} + alpha_p s_in R(theta_p(t)) v_t, or rotated after the sum (the original)."""

    def __init__(self, cfg: AFRBConfig, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.scale_in = Scalar(1.0)
        self.gate = WriteGate.of(cfg, width)
        own = cfg.pvm_omega_mode != "scalar" or cfg.pvm_phase_clock != "log"
        self.register_buffer("turn", frequencies(cfg.pvm_omega_mode, width, cfg.omega) if own else None)

    def forward(self, values: Tensor, tokens: Tokens, angles: Tensor, state: VectorState | None
                ) -> tuple[Trace, VectorState]:
        """States for values [B, T, D].

        Args:
            values: v_t.
            tokens: where they stand.
            angles: [B or 1, T, 1], the block's theta_i(t); used where the memory has no clock of its own.
            state: of the call before; None at the beginning.
        """
        if self.turn is not None:
            time = clock_time(self.cfg.pvm_phase_clock, tokens.positions)
            angles = time * self.turn.to(time.dtype)
        v = values.float()
        before = None if state is None else state.gate_inputs
        gated, seen = v, None
        if self.gate is not None:
            share, seen = self.gate(v, tokens, before)
            gated = v * share
        turned = rotate(gated, angles) if self.cfg.pvm_order == "rotate_then_accumulate" else gated
        written = self.cfg.pvm_alpha * self.scale_in() * turned
        decay = self._decay(tokens.positions).expand(v.shape[:2])
        sums = linear_recurrence(written, decay, initial=None if state is None else state.sum, resets=tokens.resets,
                                 mask=tokens.real)
        late = self.cfg.pvm_order == "accumulate_then_rotate"
        trace = Trace(rotate(sums.states, angles) if late else sums.states, angles)
        inputs = None if seen is None else last_inputs(seen, before, self.cfg.pvm_gate_taps - 1)
        return trace, VectorState(sums.final, inputs)

    def _decay(self, positions: Tensor) -> Tensor:
        """beta_t [B or 1, T] fp32, with the T2 factor where it is on."""
        cfg = self.cfg
        beta = torch.full(positions.shape, cfg.pvm_beta, dtype=torch.float32, device=positions.device)
        if not cfg.t2_enable:
            return beta
        if cfg.t2_mode == "exp":
            return beta * math.exp(-1 / cfg.t2_steps)
        time = positions.float()
        swing = 1 + cfg.t2_alpha * torch.sin(cfg.t2_omega * torch.log1p(time) + cfg.t2_phi)
        earlier = 1 + cfg.t2_alpha * torch.sin(cfg.t2_omega * time.clamp(min=1).log() + cfg.t2_phi)
        ratio = torch.where(positions > 0, math.exp(-cfg.t2_k) * swing / earlier, 1.0)
        return beta * ratio.clamp(0, 1)
