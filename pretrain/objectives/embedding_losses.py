"""Losses over the vectors of a contrastive batch (section 5 of the Spectra specification). Pure functions.

Symbols: B triplets, N negatives a query, d the width of a vector. Vectors come in fp32 (or fp64) and, but for the
spectral one, with length 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.unit import unit

PAIRWISE_EPS = 1e-6
"""Added to each coordinate of a difference, as torch's triplet loss does."""


@dataclass(frozen=True, slots=True)
class TripletIds:
    """Which texts stand where; equal ids are equal texts."""

    query: Tensor
    """[B] int64."""
    positive: Tensor
    """[B] int64."""
    negative: Tensor
    """[B, N] int64; N may be 0."""
    has_negative: Tensor
    """[B, N] bool: false where a query has fewer than N negatives."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Candidates that do not count, by query and by positive."""

    forward: Tensor
    """[B, B + B*N] bool, for queries: all positives, then all negatives triplet by triplet."""
    reverse: Tensor
    """[B, B] bool, for positives: all queries."""


def blocked_candidates(ids: TripletIds, *, hard_negatives: bool, false_negatives: bool) -> Blocked:
    """With `false_negatives`, of another triplet j: its positive (and, in reverse, its query) where it has the query or
    the positive of i, and its negatives that are the positive of i. Own ones never. Negatives that are not there are
    always blocked; without `hard_negatives` none are candidates and `forward` is [B, B].
    """
    count = len(ids.query)
    others = ~torch.eye(count, dtype=torch.bool, device=ids.query.device)
    same = (ids.query[:, None] == ids.query) | (ids.positive[:, None] == ids.positive)
    pairs = same & others if false_negatives else torch.zeros_like(others)
    if not hard_negatives:
        return Blocked(pairs, pairs)
    negatives = (~ids.has_negative)[None].expand(count, -1, -1)
    if false_negatives:
        negatives = negatives | (others[:, :, None] & (ids.negative[None] == ids.positive[:, None, None]))
    return Blocked(torch.cat([pairs, negatives.flatten(1)], 1), pairs)


def info_nce(queries: Tensor, candidates: Tensor, temperature: float, blocked: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over i of -log softmax_j(q_i . c_j / T) at j = i, share of queries whose own candidate comes first).

    queries [B, d], candidates [M, d] with M >= B, blocked [B, M].
    """
    logits = (queries @ candidates.T / temperature).masked_fill(blocked, -math.inf)
    own = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, own), (logits.detach().argmax(1) == own).to(logits.dtype).mean()


def symmetric_nce(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float,
                  blocked: Blocked) -> tuple[Tensor, Tensor]:
    """(mean of InfoNCE from queries and from positives, accuracy of queries). anchor, positive [B, d], negative
    [B, N, d], taken as candidates where `blocked` covers them."""
    with_negatives = blocked.forward.shape[1] > len(anchor)
    candidates = torch.cat([positive, negative.flatten(0, 1)]) if with_negatives else positive
    there, accuracy = info_nce(anchor, candidates, temperature, blocked.forward)
    back, _ = info_nce(positive, anchor, temperature, blocked.reverse)
    return (there + back) / 2, accuracy


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, has_negative: Tensor, margin: float) -> Tensor:
    """Mean over negatives that are there of max(0, |a - p| - |a - n| + margin); 0 where there are none."""
    near = (anchor - positive + PAIRWISE_EPS).norm(dim=-1)
    far = (anchor[:, None] - negative + PAIRWISE_EPS).norm(dim=-1)
    return _mean_where((near[:, None] - far + margin).clamp_min(0), has_negative)


def angular(student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor],
            has_negative: Tensor) -> Tensor:
    """Half the mean squared difference of cosines of query and positive, half that of query and negatives.

    Each side is (anchor [B, d], positive [B, d], negative [B, N, d]); the teacher's is not pulled.
    """
    own, target = ((a * p).sum(-1) for a, p, _ in (student, teacher))
    own_n, target_n = ((a[:, None] * n).sum(-1) for a, _, n in (student, teacher))
    return ((own - target.detach()).square().mean()
            + _mean_where((own_n - target_n.detach()).square(), has_negative)) / 2


def bridge(semantic: Tensor, entity: Tensor, *, metric: str, stopgrad: bool) -> Tensor:
    """Distance of the entity vectors [B, e] to the first e coordinates, at length 1, of the semantic ones [B, d].

    It is 1 - cosine, or the mean squared difference over all B x e entries.
    """
    target = unit(semantic[:, :entity.shape[1]])
    target = target.detach() if stopgrad else target
    if metric == "mse":
        return F.mse_loss(target, entity)
    return (1 - (target * entity).sum(-1)).mean()


def entropy_reward(spectral: Tensor, kind: str) -> Tensor:
    """Minus the entropy in nats of the mean of softmax(spectral [B, s]) over texts (`marginal`), or minus the mean of
    each text's (`sample`, whose optimum is one constant vector for all texts)."""
    shares = spectral.softmax(-1)
    if kind == "marginal":
        shares = shares.mean(0)
    return torch.xlogy(shares, shares).sum(-1).mean()


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `values` where `chosen`; 0 where nothing is, with a gradient of 0."""
    weights = chosen.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1)
