"""The two branches of a block: attention with fractal enrichment, and the spectral branch (sections 3.2 to 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.models.spectra.hf_config import SpectraHFConfig
from pretrain.models.spectra.layers import ResidualLinear, register_gate
from pretrain.ops.fractal import Visibility, explicit_attention, fused_attention
from pretrain.ops.precision import wide
from pretrain.ops.spectral_gate import gate_weights, normalised_entropy, text_mean


class FractalAttention(nn.Module):
    """Multi-head attention; `w_frac` [depth] weighs its rounds of enrichment and is shared by all heads."""

    w_frac: Tensor | None

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = nn.Linear(h, h), nn.Linear(h, h), nn.Linear(h, h)
        self.output = ResidualLinear(h, h)
        self.dropout = nn.Dropout(config.dropout)
        first = torch.full((config.fractal_depth,), config.fractal_init)
        register_gate(self, "w_frac", first if config.fractal_depth else None, trained=config.learnable_fractal)

    def forward(self, x: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor]:
        """x [B, S, H] -> (output [B, S, H], mean |w_frac|, detached)."""
        b, s, h = x.shape
        q, k, v = (layer(x).view(b, s, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        w = x.new_zeros(1, dtype=torch.float32) if self.w_frac is None else wide(self.w_frac)
        weights = () if self.w_frac is None else w.unbind()
        if self.config.attention_impl == "fused" and visibility.together is None:
            written_out = self.config._attn_implementation == "eager"
            y = fused_attention(q, k, v, weights[0] if weights else None, visibility, written_out=written_out)
        else:
            y = explicit_attention(q, k, v, weights, visibility, penalty_first=self.config.profile == "compat")
        return self.output(self.dropout(y.transpose(1, 2).reshape(b, s, h))), w.detach().abs().mean()


class SpectralBranch(nn.Module):
    """One gating head of width s and the learned weight f of its output; `theta` has shape [1]."""

    theta: Tensor

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        h, s = config.hidden_size, config.spectral_dim
        self.config = config
        self.query, self.key, self.value = nn.Linear(h, s), nn.Linear(h, s), nn.Linear(h, s)
        self.output = ResidualLinear(s, h)
        register_gate(self, "theta", torch.full((1,), first_theta(config)), trained=config.learnable_spectral_fusion)

    def forward(self, x: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, H] -> (f sy [B, S, H], entropy of the weights' rows by text [B], f; the last two detached)."""
        weights = gate_weights(self.query(x), self.key(x), visibility, self.config.spectral_norm)
        y = self.output(weights.to(x.dtype) @ self.value(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.spectral_entropy_gate):
            entropy = normalised_entropy(weights, visibility)
        if self.config.spectral_entropy_gate:
            y = y * (1 - entropy)[..., None].to(y.dtype)
        f = self._fusion()
        return f.to(y.dtype) * y, text_mean(entropy.detach(), visibility.real), f.detach()[0]

    def _fusion(self) -> Tensor:
        """f [1], in fp32."""
        theta, top = wide(self.theta), self.config.fusion_max
        return theta.clamp(0, top) if self.config.profile == "compat" else top * torch.sigmoid(theta)


def first_theta(config: SpectraHFConfig) -> float:
    """The parameter that gives `fusion_init`: itself where f is clamped, else its logit below `fusion_max`."""
    if config.profile == "compat":
        return config.fusion_init
    return math.log(config.fusion_init / (config.fusion_max - config.fusion_init))
