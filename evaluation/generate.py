"""Continue texts with a causal language model.

Prompts of different lengths share a batch without any padding: all rows advance together from the shortest prompt, and
a row whose prompt is not used up is fed its own next token instead of a drawn one. So there is no padding that could
leak into a cache, and every family that can decode step by step works unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.sampling import Sampling, next_token, uniforms
from pretrain.errors import UserError

Forward = Callable[..., Any]
"""Called as forward(input_ids=[B, t], past_key_values=..., use_cache=True, return_logits=True) -> LMOutput."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a text ends."""

    max_new_tokens: int = 128
    eos_id: int | None = None
    """A text ends after this token, which is part of the result; None: only length ends it."""
    max_seq_len: int | None = None
    """Longest input of the model; a text ends when prompt and continuation fill it."""
    fixed_length: bool = False
    """Never leave the loop early: on several ranks all must make the same number of forwards."""


def generate(forward: Forward, prompts: Sequence[Sequence[int]], limits: Limits, sampling: Sampling, *,
             vocab_size: int, device: torch.device, sample_ids: Sequence[int] | None = None) -> list[list[int]]:
    """Continue each prompt.

    Args:
        forward: the model in eval mode; where it returns no `past_key_values` the whole text is fed again each time.
        prompts: token ids, each at least one long.
        limits: when texts end.
        sampling: how tokens are drawn.
        vocab_size: ids at or above it are never drawn and refused in prompts.
        device: where inputs go.
        sample_ids: keys of the random draws; by default 0, 1, ... A text depends on its own id and prompt only.

    Returns:
        The new tokens of each prompt, without the prompt.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room.
    """
    ids = list(range(len(prompts))) if sample_ids is None else list(sample_ids)
    _check(prompts, ids, limits, vocab_size)
    if not prompts or limits.max_new_tokens == 0:
        return [[] for _ in prompts]
    rows, lengths = len(prompts), [len(p) for p in prompts]
    ends = [min(n + limits.max_new_tokens, limits.max_seq_len or n + limits.max_new_tokens) for n in lengths]
    text = torch.zeros(rows, max(ends), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        text[row, :len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    is_prompt = torch.arange(max(ends)) < torch.tensor(lengths)[:, None]
    seen = torch.zeros(rows, vocab_size, dtype=torch.bool)
    start = min(lengths)
    seen.scatter_(1, text[:, :start], True)
    draws = uniforms(sampling.seed, ids, limits.max_new_tokens)
    first_draw = torch.tensor(lengths)
    done = torch.zeros(rows, dtype=torch.bool)
    cache, fed = None, 0
    stops = list(ends)
    for place in range(start, max(ends)):
        with torch.no_grad():
            out = forward(input_ids=text[:, fed:place].to(device), past_key_values=cache, use_cache=True,
                          return_logits=True)
        cache = out.past_key_values
        fed = place if cache is not None else 0
        draw = draws.gather(1, (place - first_draw).clamp(0, limits.max_new_tokens - 1)[:, None]).squeeze(1)
        drawn = next_token(out.logits[:, -1, :vocab_size], seen, draw, sampling)
        text[:, place] = torch.where(is_prompt[:, place], text[:, place], drawn)
        seen.scatter_(1, text[:, place:place + 1], True)
        for row in range(rows):
            if not done[row] and place >= lengths[row] and (place + 1 >= ends[row] or drawn[row] == limits.eos_id):
                done[row], stops[row] = True, place + 1
        if done.all() and not limits.fixed_length:
            break
    return [text[row, lengths[row]:stops[row]].tolist() for row in range(rows)]


def _check(prompts: Sequence[Sequence[int]], sample_ids: list[int], limits: Limits, vocab_size: int) -> None:
    if len(sample_ids) != len(prompts):
        raise ValueError(f"{len(sample_ids)} sample ids for {len(prompts)} prompts")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no token: give some text, or the end-of-text token")
        if max(prompt) >= vocab_size or min(prompt) < 0:
            raise UserError(f"prompt {row} holds token {max(prompt)}, the model knows 0 to {vocab_size - 1}: "
                            "another tokenizer made it")
        if limits.max_seq_len is not None and len(prompt) >= limits.max_seq_len:
            raise UserError(f"prompt {row} has {len(prompt)} tokens and the model takes {limits.max_seq_len}: "
                            "nothing can follow; shorten it")
