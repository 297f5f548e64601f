"""From logits to the next token: penalties, filters and draws, all pure.

Every draw is a function of (seed, sample id, position) and of the row's own logits, so a text does not depend on what
else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probability reaches p; 1: all."""
    repetition_penalty: float = 1.0
    """Tokens already in the text become less likely by this factor on their logit; 1: off."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative; 0 takes the likeliest token, 1 samples")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative; 0 switches it off")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must lie in (0, 1]; 1 switches it off")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition penalty {self.repetition_penalty} must be above 0; 1 switches it off")


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty`.

    Source: Keskar et al., CTRL (2019), section 4.1, with a sign rule: a penalty above 1 lowers any logit.

    Args:
        logits: [B, V].
        seen: [B, V] bool, tokens that already stand in the text.
        penalty: above 0; 1 changes nothing.
    """
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest logits of each row [B, V] to -inf. Of equal ones at the edge the lower id is kept."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], False), -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Set to -inf what is outside the smallest set of likeliest tokens whose probability reaches p; one always stays.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1.
    """
    if p >= 1.0:
        return logits
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    chances = torch.softmax(ordered, dim=-1)
    reached_before = chances.cumsum(dim=-1) - chances >= p
    reached_before[..., 0] = False
    return logits.masked_fill(torch.zeros_like(reached_before).scatter(-1, order, reached_before), -torch.inf)


def uniforms(seed: int, sample_ids: list[int], positions: int) -> torch.Tensor:
    """[samples, positions] float64 in [0, 1): the draws of each sample, a function of (seed, sample id) alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, sample])).random(positions) for sample in sample_ids]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, positions, dtype=torch.float64)


def next_token(logits: torch.Tensor, seen: torch.Tensor, draw: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: [B, V], any dtype and device; worked on in float64 on the CPU.
        seen: [B, V] bool, tokens that already stand in the text.
        draw: [B] float64 in [0, 1).
        sampling: penalties and filters; applied in the order penalty, temperature, top-k, top-p.

    Returns:
        [B] int64.
    """
    scores = penalise_repetition(logits.detach().to("cpu", torch.float64), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    scores = keep_top_p(keep_top_k(scores / sampling.temperature, sampling.top_k), sampling.top_p)
    cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    # The draw is scaled to the sum that was reached, so that rounding can never pick a token of probability zero.
    return torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
