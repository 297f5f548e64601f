"""The resonant block: token-wise mixer, memory, phase branch, gates (spec, section 2)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.models.afrb.phase import Scalar, Tokens, clock_time
from pretrain.models.afrb.pvm import Trace, VectorMemory, VectorState
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.ops.phase import causal_taps, last_inputs, rotate


class BlockState(NamedTuple):
    """What decoding goes on from."""

    memory: VectorState | None
    mixer_inputs: Tensor | None
    """[B, k-1, D]: what the convolution saw last."""


class BlockControls(NamedTuple):
    """Values of the family's hooks for one block at this step."""

    ramp: float = 1.0
    """rho: how far the phase branch is switched on."""
    phase_ramp: float = 1.0
    """How far its phase offset is."""
    omega_trained: float = 1.0
    """Whether its frequency is updated."""
    figures: bool = False
    """Whether the block is to measure itself."""
    memory: float = 1.0
    """0: its memory is read as if it were empty."""


class BlockOutput(NamedTuple):
    """Result of a block."""

    hidden: Tensor
    """[B, T, D]."""
    trace: Trace | None
    """Of its memory."""
    angles: Tensor
    """[B or 1, T, 1]: theta_i(t)."""
    state: BlockState
    figures: dict[str, Tensor]
    """Detached scalars [1], where asked for: gates, frequency, the memory's norm over that of what is written."""


class _Bounded(torch.autograd.Function):
    """Clamp, whose gradient stops only where a step would lead further out: what lies outside can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        outwards = ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0))
        return grad.masked_fill(outwards, 0), None, None


class ResonantBlock(GradientCheckpointingLayer):
    """y = x + s * LN2(g + gamma rho e): g mixes channels of LN1(x) and takes in the memory, e is LN1(x) turned by its
    phase."""

    def __init__(self, cfg: AFRBConfig, index: int) -> None:
        super().__init__()
        self.cfg, self.index = cfg, index
        width = cfg.hidden_size
        profile = cfg.block_profile()[index]
        self.alpha, self.phase, gamma = profile["alpha"], profile["phi"], profile["gamma"]
        self.norm_in, self.norm_out = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.scale = nn.Parameter(torch.empty(width))
        self.omega = Scalar(profile["omega"], learned=cfg.adaptive_omega)
        self.mixer = nn.Linear(width, 2 * width) if cfg.mixer == "glu" else None
        if cfg.mixer == "conv":
            self.taps = nn.Parameter(torch.empty(cfg.mixer_taps, width))
            self.taps_bias = nn.Parameter(torch.empty(width))
        self.gamma = Scalar(math.log(gamma / (1 - gamma))) if cfg.phase_mode != "none" else None
        self.embed = nn.Linear(2, width) if cfg.phase_mode == "embed" else None
        self.pvm = VectorMemory(cfg, width) if cfg.vector_pvm else None
        self.kappa = Scalar(cfg.pvm_gate_init) if cfg.vector_pvm else None

    def reset_parameters(self) -> None:
        """Fresh weights: with scale 0 the block is the identity."""
        nn.init.constant_(self.scale, self.cfg.layerscale_init)
        width = self.cfg.hidden_size
        if self.mixer is not None:
            nn.init.normal_(self.mixer.weight, std=width ** -0.5)
            nn.init.zeros_(self.mixer.bias)
        else:
            nn.init.normal_(self.taps, std=self.cfg.mixer_taps ** -0.5)
            nn.init.zeros_(self.taps_bias)
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=0.001)
            nn.init.zeros_(self.embed.bias)

    def forward(self, x: Tensor, tokens: Tokens, controls: BlockControls, state: BlockState | None) -> BlockOutput:
        """One block over x [B, T, D]; `state` is that of the call before, None at the beginning.

        It computes in the type of its own weights, which need not be that of x.
        """
        u = self.norm_in(x.to(self.scale.dtype))
        before = None if state is None else state.mixer_inputs
        g = self._mix(u, tokens, before)
        angles = self._angles(tokens.positions, controls)
        trace, memory = None, None
        written = g
        if self.pvm is not None and self.kappa is not None:
            trace, memory = self.pvm(g, tokens, angles, None if state is None else state.memory)
            if controls.memory != 1:
                trace = Trace(trace.states * controls.memory, trace.angles)
            g = g + (torch.sigmoid(self.kappa()) * trace.states).to(g.dtype)
        if self.gamma is not None:
            strength = torch.sigmoid(self.gamma()) * controls.ramp
            g = g + (strength * self._turned(u.float(), angles)).to(g.dtype)
        inputs = last_inputs(u, before, self.cfg.mixer_taps - 1) if self.mixer is None else None
        hidden = x + (self.scale * self.norm_out(g)).to(x.dtype)
        figures = self._figures(written, trace) if controls.figures else {}
        return BlockOutput(hidden, trace, angles, BlockState(memory, inputs), figures)

    def _mix(self, u: Tensor, tokens: Tokens, before: Tensor | None) -> Tensor:
        """g [B, T, D]."""
        if self.mixer is None:
            return causal_taps(u, self.taps, before=before, reach=tokens.reach) + self.taps_bias
        value, gate = self.mixer(u).chunk(2, -1)
        return value * torch.sigmoid(gate)

    def _angles(self, positions: Tensor, controls: BlockControls) -> Tensor:
        """theta_i(t) = omega_i ln(1 + t) + phi_i, [B or 1, T, 1] in the widest float."""
        omega = self._frequency(controls.omega_trained)
        time = clock_time("log", positions)
        return time * omega.to(time.dtype) + self.phase * controls.phase_ramp

    def _frequency(self, trained: float = 1.0) -> Tensor:
        """omega_i [1] fp32."""
        omega = self.omega(trained)
        if not self.cfg.adaptive_omega:
            return omega
        bounded: Tensor = _Bounded.apply(omega, self.cfg.omega_min, self.cfg.omega_max)
        return bounded

    def _turned(self, u: Tensor, angles: Tensor) -> Tensor:
        """e [B, T, D] fp32."""
        if self.embed is None:
            other = rotate(u, angles)
        else:
            other = self.embed(torch.cat([angles.cos(), angles.sin()], -1).to(self.embed.weight.dtype)).float()
        return (1 - self.alpha) * u + self.alpha * other

    @torch.no_grad()
    def _figures(self, written: Tensor, trace: Trace | None) -> dict[str, Tensor]:
        figures: dict[str, Tensor] = {}
        if self.gamma is not None:
            figures |= {"gamma": torch.sigmoid(self.gamma()), "omega": self._frequency()}
        if trace is not None and self.kappa is not None and self.pvm is not None:
            figures["pvm_gate"] = torch.sigmoid(self.kappa())
            figures["pvm_gate_start"] = torch.sigmoid(self.kappa.start)
            norms = written.float().norm(dim=-1).mean() * self.pvm.scale_in()
            figures["pvm_memory_norm"] = trace.states[:, -1].norm(dim=-1).mean() / norms.clamp(min=1e-12)
        return figures
