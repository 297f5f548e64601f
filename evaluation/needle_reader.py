"""Answers of a language model to needles: greedy and free-running, teacher-forced, and at places of the context.

Only the model's one forward is used, so any causal family can be asked: families that read out a memory are told the
rows where that happens (`readout_positions`), for others those are just the rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.models.base import Family

READOUT_OFF = "readout_off"
"""Control that leaves a family's readout out of its logits."""
_LOGITS_BYTES = 1 << 28
"""Logits held at once where a model gives them for whole sequences only."""


def reads_out(config: RunConfig | None) -> bool:
    """Whether the model's forward takes `readout_positions`: that of every family with objective `needle` does."""
    if config is None:
        return False
    family: Family = resolve(FAMILIES, config.model.family, "model.family")
    return "needle" in family.objectives


@dataclass(frozen=True, slots=True)
class Reader:
    """A model in eval mode, and how to ask it. All methods are without gradient; collective where the forward is."""

    forward: Callable[..., Any]
    device: torch.device
    readout: bool
    """Whether forward takes `readout_positions`."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """Passed on top of what the model is called with anyway; only where `readout`."""

    def free(self, prefix: Tensor, length: int, vocab_size: int) -> Tensor:
        """Greedy answers [B, length] to prefixes [B, rs]; each answer is fed back. Ids are below `vocab_size`."""
        prefix = prefix.to(self.device)
        state, feed, answer = None, prefix, prefix[:, :0]
        for _ in range(length):
            count = 1 if state is not None else answer.shape[1] + 1
            out = self._call(feed, self._last(feed, count), past_key_values=state, use_cache=True)
            token = out.logits[:, -1:, :vocab_size].argmax(-1)
            answer = torch.cat([answer, token], dim=1)
            state = out.past_key_values
            feed = token if state is not None else torch.cat([prefix, answer], dim=1)
        return answer.cpu()

    def at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """fp32 logits [B, R, V] at `positions` [B, R] of `tokens` [B, T]."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        if self.readout:
            logits: Tensor = self._call(tokens, positions).logits
            return logits.float()
        first = int(positions.min())
        kept = self._call(tokens, positions, logits_to_keep=tokens.shape[1] - first).logits
        places = positions - (tokens.shape[1] - kept.shape[1])
        return kept.gather(1, places[:, :, None].expand(-1, -1, kept.shape[2])).float()

    def in_parts(self, tokens: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        """First choices [B, R] at `positions`, in parts that hold the logits of whole sequences in bounds."""
        rows = len(tokens) if self.readout else max(1, _LOGITS_BYTES // (4 * tokens.shape[1] * vocab_size))
        parts = zip(tokens.split(rows), positions.split(rows), strict=True)
        return torch.cat([self.at(t, p)[..., :vocab_size].argmax(-1).cpu() for t, p in parts])

    def _last(self, feed: Tensor, count: int) -> Tensor:
        """[B, count] the last rows of what is fed."""
        length = feed.shape[1]
        return torch.arange(length - count, length, device=self.device).repeat(len(feed), 1)

    def _call(self, tokens: Tensor, positions: Tensor, logits_to_keep: int = 1, **inputs: Any) -> Any:
        extra: dict[str, Any] = {"logits_to_keep": logits_to_keep}
        if self.readout:
            extra = {"readout_positions": positions, **({"controls": self.controls} if self.controls else {})}
        with torch.no_grad():
            return self.forward(input_ids=tokens, return_logits=True, **extra, **inputs)


def ranks(logits: Tensor, wanted: Tensor) -> Tensor:
    """[B, L] how many ids stand before the wanted one in `logits` [B, L, V]; of equals, the lower id comes first."""
    own = logits.gather(2, wanted[:, :, None])
    earlier = torch.arange(logits.shape[2], device=logits.device) < wanted[:, :, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """[B, L] negative log-likelihood in nats."""
    return logits.logsumexp(-1) - logits.gather(2, wanted[:, :, None]).squeeze(2)
