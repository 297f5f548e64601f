"""Losses over the vectors of a contrastive batch (section 5 of the Spectra specification). Pure functions.

Symbols: B triplets, N negatives a query, d the width of a vector. Vectors come in fp32 (or fp64) and, but for the
spectral one, with length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.unit import unit

PAIRWISE_EPS = 1e-6
"""Added to each coordinate of a difference, as torch's triplet loss does."""
SIMILARITIES = 2**20
"""Similarities alive at once; a block has one row at least."""


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
    """Candidates that do not count. Formed for a few rows at a time: no table of all pairs is ever kept.

    With `false_negatives`, of another triplet j: its positive (and, in reverse, its query) where it has the query or
    the positive of i, and its negatives that are the positive of i. Own ones never. Negatives that are not there are
    always blocked; without `hard_negatives` none are candidates.
    """

    ids: TripletIds
    hard_negatives: bool
    false_negatives: bool

    def forward(self, rows: slice) -> Tensor:
        """[r, B + B*N] bool, for the queries `rows`: all positives, then all negatives triplet by triplet; [r, B]
        without hard negatives."""
        ids, pairs = self.ids, self.reverse(rows)
        if not self.hard_negatives:
            return pairs
        negatives = (~ids.has_negative)[None].expand(len(pairs), -1, -1)
        if self.false_negatives:
            own_positive = ids.negative[None] == ids.positive[rows, None, None]
            negatives = negatives | (self._others(rows)[:, :, None] & own_positive)
        return torch.cat([pairs, negatives.flatten(1)], 1)

    def reverse(self, rows: slice) -> Tensor:
        """[r, B] bool, for the positives `rows`: all queries."""
        others, query, positive = self._others(rows), self.ids.query, self.ids.positive
        if not self.false_negatives:
            return torch.zeros_like(others)
        return others & ((query[rows, None] == query) | (positive[rows, None] == positive))

    def _others(self, rows: slice) -> Tensor:
        everyone = torch.arange(len(self.ids.query), device=self.ids.query.device)
        return everyone[rows, None] != everyone


def info_nce(queries: Tensor, candidates: Tensor, temperature: float,
             blocked: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """(mean over i of -log softmax_j(q_i . c_j / T) at j = i, share of queries whose own candidate comes first).

    queries [B, d], candidates [M, d] with M >= B; `blocked` gives [r, M] bool for a slice of rows. Similarities exist
    for a few rows at a time: what is kept for the backward pass is as large as the vectors.
    """
    with_gradient = torch.is_grad_enabled() and (queries.requires_grad or candidates.requires_grad)
    loss, accuracy = _RowBlocks.apply(queries, candidates, temperature, blocked, with_gradient)
    return loss, accuracy


class _RowBlocks(torch.autograd.Function):
    """InfoNCE whose gradients are formed in the forward pass, block by block, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, temperature: float,
                blocked: Callable[[slice], Tensor], with_gradient: bool) -> tuple[Tensor, Tensor]:
        count, step = len(queries), max(1, SIMILARITIES // max(1, len(candidates)))
        loss, correct = queries.new_zeros(()), queries.new_zeros(())
        by_query = torch.empty_like(queries) if with_gradient else None
        by_candidate = torch.zeros_like(candidates) if with_gradient else None
        for start in range(0, count, step):
            rows = slice(start, min(count, start + step))
            own = torch.arange(rows.start, rows.stop, device=queries.device)
            logits = (queries[rows] @ candidates.T).div_(temperature).masked_fill_(blocked(rows), -math.inf)
            correct += (logits.argmax(1) == own).sum()
            shares = logits.log_softmax(1)
            loss -= shares.gather(1, own[:, None]).sum()
            if by_query is not None and by_candidate is not None:
                pull = shares.exp_().scatter_add_(1, own[:, None], shares.new_full((len(own), 1), -1.0))
                pull.div_(temperature * count)
                torch.mm(pull, candidates, out=by_query[rows])
                by_candidate.addmm_(pull.T, queries[rows])
        ctx.save_for_backward(by_query, by_candidate)
        accuracy = correct / count
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        by_query, by_candidate = ctx.saved_tensors
        return grads[0] * by_query, grads[0] * by_candidate, None, None, None


def symmetric_nce(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float, blocked: Blocked) -> Tensor:
    """Mean of InfoNCE from queries and from positives. anchor, positive [B, d], negative [B, N, d], taken as candidates
    where `blocked` covers them."""
    there, _ = nce_of_queries(anchor, positive, negative, temperature, blocked)
    back, _ = info_nce(positive, anchor, temperature, blocked.reverse)
    return (there + back) / 2


def nce_of_queries(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float,
                   blocked: Blocked) -> tuple[Tensor, Tensor]:
    """(InfoNCE of queries against positives and, where `blocked` covers them, negatives; their accuracy)."""
    candidates = torch.cat([positive, negative.flatten(0, 1)]) if blocked.hard_negatives else positive
    return info_nce(anchor, candidates, temperature, blocked.forward)


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
