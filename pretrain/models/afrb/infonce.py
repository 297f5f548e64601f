"""InfoNCE of what a memory says against the output table (spec, section 7)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NCESums(NamedTuple):
    """Sums over counted rows. Chance is ln(1 + N) nats and 1 / (1 + N) correct."""

    loss: Tensor
    """fp32 scalar, nats."""
    count: Tensor
    """int64 scalar."""
    correct: Tensor
    """int64 scalar: rows whose positive is the first of the largest scores."""


def infonce(vectors: Tensor, positive: Tensor, negative: Tensor, counted: Tensor, tau: float,
            same: Tensor | None = None) -> NCESums:
    """-ln(e^{s+} / (e^{s+} + sum e^{s-})) with s = cos / tau, in fp32.

    Args:
        vectors: [B, R, D] queries.
        positive: [B, R, D] the row that each should point to.
        negative: [B, N, D] rows that none of the sample should.
        counted: [B, R] bool.
        tau: temperature.
        same: [B, R, N] bool, where a negative is the positive itself, which is left out; None: nowhere.
    """
    query, wanted, others = (F.normalize(x.float(), dim=-1) for x in (vectors, positive, negative))
    against = query @ others.transpose(1, 2)
    if same is not None:
        against = against.masked_fill(same, -math.inf)
    scores = torch.cat([(query * wanted).sum(-1, keepdim=True), against], -1) / tau
    loss = (scores.logsumexp(-1) - scores[..., 0]).where(counted, 0).sum()
    correct = ((scores.argmax(-1) == 0) & counted).sum()
    return NCESums(loss, counted.sum(), correct.detach())
