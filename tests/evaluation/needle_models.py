"""Models whose answers to needles are known: an oracle that looks its last tokens up, an echo, a constant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.models.base import LMOutput


class Fake(nn.Module):
    """A next token for every place, as a one-hot row of logits; with or without a state for decoding."""

    def __init__(self, vocab_size: int, *, cached: bool = True) -> None:
        super().__init__()
        self.vocab_size, self.cached, self.calls = vocab_size, cached, []
        self.weight = nn.Parameter(torch.zeros(1))

    def predict(self, tokens: Tensor, place: int) -> int:
        """The choice after `tokens` [:place + 1] of one row."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, readout_positions: Tensor | None = None, past_key_values: Tensor | None = None,
                use_cache: bool = False, return_logits: bool = False, logits_to_keep: int = 0,
                controls: dict | None = None, **unused) -> LMOutput:
        self.calls.append({"rows": len(input_ids), "length": input_ids.shape[1], "controls": dict(controls or {})})
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        past = seen.shape[1] - input_ids.shape[1]
        if readout_positions is None:
            kept = logits_to_keep or input_ids.shape[1]
            readout_positions = torch.arange(input_ids.shape[1] - kept, input_ids.shape[1]).repeat(len(seen), 1)
        choices = torch.tensor([[self.answer(row, past + place, controls or {}) for place in places]
                                for row, places in zip(seen, readout_positions.tolist(), strict=True)])
        logits = torch.nn.functional.one_hot(choices, self.vocab_size).float() * 50
        return LMOutput(logits=logits, past_key_values=seen if use_cache and self.cached else None)

    def answer(self, row: Tensor, place: int, controls: dict) -> int:
        return self.predict(row, place)


class Oracle(Fake):
    """Finds the last four tokens earlier in the text and gives what followed; `memory_zero` blinds it."""

    def answer(self, row: Tensor, place: int, controls: dict) -> int:
        if controls.get("memory_zero") or controls.get("readout_off"):
            return 0
        text = row.numpy()
        windows = np.lib.stride_tricks.sliding_window_view(text[:place], 4)
        found = np.flatnonzero((windows == text[place - 3:place + 1]).all(axis=1))
        return int(text[found[0] + 4]) if len(found) else 0


class Echo(Fake):
    """Repeats its input."""

    def predict(self, tokens: Tensor, place: int) -> int:
        return int(tokens[place])


class Constant(Fake):
    """Knows nothing: all logits are equal."""

    def forward(self, *arguments, **named) -> LMOutput:
        output = super().forward(*arguments, **named)
        output["logits"] = torch.zeros_like(output.logits)
        return output

    def predict(self, tokens: Tensor, place: int) -> int:
        return 0
