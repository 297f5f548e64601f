"""Pooling and the five heads (sections 3.7 and 3.8). Vectors leave them in fp32 and with length 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.spectra.hf_config import SpectraHFConfig
from pretrain.models.spectra.layers import layer_norm
from pretrain.ops.precision import wide, without_autocast
from pretrain.ops.unit import unit


def mean_pool(states: Tensor, real: Tensor) -> Tensor:
    """[B, S, H] -> [B, H]: mean over real tokens, in fp32."""
    weights = real[..., None].to(wide(states).dtype)
    return (wide(states) * weights).sum(1) / weights.sum(1).clamp_min(1)


class ProjectionHead(nn.Module):
    """Linear, LayerNorm: heads semantic, entity and anchor."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden, width)
        self.norm = layer_norm(width)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, H] -> [B, width]."""
        return unit(self.norm(self.project(pooled)))


class RetrievalHead(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, H] -> [B, width]."""
        return unit(self.outer(F.gelu(self.inner(pooled))))


class RankingHead(nn.Module):
    """The "anomalous projection": an inner vector a, scaled by how far it is from a learned basis, beside a spectral
    vector of it."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        h, am, s = config.hidden_size, config.anomalous_dim, config.spectral_dim
        self.widen, self.widen_norm = nn.Linear(h, 2 * h), layer_norm(2 * h)
        self.inner, self.inner_norm = nn.Linear(2 * h, am), layer_norm(am)
        self.narrow, self.spectral = nn.Linear(am, s), nn.Linear(s, s)
        self.spectral_norm = layer_norm(s)
        self.basis = nn.Parameter(torch.empty(config.anomaly_basis, am))
        self.output, self.output_norm = nn.Linear(am + s, config.ranking_dim), layer_norm(config.ranking_dim)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, H] -> (ranking [B, r], a [B, am], spectral [B, s], score [B] in (0, 0.5])."""
        a = self.inner_norm(F.gelu(self.inner(self.widen_norm(F.gelu(self.widen(pooled))))))
        spectral = self.spectral_norm(self.spectral(torch.tanh(self.narrow(a))))
        with without_autocast(a):
            score = 1 - torch.sigmoid((wide(a) @ wide(self.basis).T).abs().amax(-1))
        joined = torch.cat([score[:, None].to(a.dtype) * a, spectral], -1)
        return unit(self.output_norm(self.output(joined))), a, wide(spectral), score


class SpectraHeads(nn.Module):
    """States to named vectors."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.semantic = ProjectionHead(h, config.sem_dims[0]) if config.enable_semantic else None
        self.entity = ProjectionHead(h, config.ent_dims[0]) if config.enable_entity else None
        self.anchor = ProjectionHead(h, config.anchor_dim) if config.enable_anchor64 else None
        self.retrieval = RetrievalHead(h, config.retrieval_dim)
        self.ranking = RankingHead(config)

    def forward(self, states: Tensor, real: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """states [B, S, H], real [B, S] -> (vectors by `HEAD_WIDTH`, auxiliary tensors by name)."""
        config = self.config
        mean = mean_pool(states, real)
        pooled = mean if config.pooling == "mean" else wide(states[:, 0])
        given = pooled.to(states.dtype)
        vectors: dict[str, Tensor] = {}
        for name, head, widths in (("semantic", self.semantic, config.sem_dims),
                                   ("entity", self.entity, config.ent_dims)):
            if head is not None:
                whole = head(given)
                vectors[f"{name}_{widths[0]}"] = whole
                vectors |= {f"{name}_{width}": unit(whole[:, :width]) for width in widths[1:]}
        if self.anchor is not None:
            vectors[f"anchor_{config.anchor_dim}"] = self.anchor(given)
        vectors[f"retrieval_{config.retrieval_dim}"] = self.retrieval(given)
        # The published code pools by the mean here, whatever its setting says.
        ranked = mean.to(states.dtype) if config.profile == "compat" else given
        ranking, anomalous, spectral, score = self.ranking(ranked)
        vectors[f"ranking_{config.ranking_dim}"] = ranking
        return vectors, {"anomalous": anomalous, "spectral": spectral, "anomaly_score": score, "pooled": pooled}
