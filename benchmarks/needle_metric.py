"""Can the needle metric reach its ends? A model that was told every answer, and one that repeats its input.

Asked exactly as trained models are, on the task of the claim (512 tokens, no marker) and on that with a key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import write_results
from evaluation import needle
from evaluation.needle import Answers
from evaluation.needle_reader import Reader
from evaluation.results import records
from pretrain.config.needle import NeedleConfig
from pretrain.data.needle import NeedleSource
from pretrain.data.open import eval_batches
from pretrain.models.base import LMOutput

EXAMPLES = 400
_NAMED = 32
"""First tokens of a context by which it is known again."""


class Known(nn.Module):
    """Puts one token far before all others at every asked place."""

    def __init__(self, source: NeedleSource) -> None:
        super().__init__()
        self.task = source.config
        rows = source.rows(np.arange(len(source)))
        self.answers = {tuple(row[:_NAMED]): answer for row, answer in zip(rows.tokens.tolist(), rows.needle.tolist(),
                                                                           strict=True)}

    def choose(self, seen: Tensor, places: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, readout_positions: Tensor, past_key_values: Tensor | None = None,
                **unused: Any) -> LMOutput:
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        choices = self.choose(seen, readout_positions + seen.shape[1] - input_ids.shape[1])
        return LMOutput(logits=50 * nn.functional.one_hot(choices, self.task.vocab_size).float(), past_key_values=seen)


class Planted(Known):
    """Was told the needle of every context, and gives token j at the place that is asked for it."""

    def choose(self, seen: Tensor, places: Tensor) -> Tensor:
        told = torch.tensor([self.answers[tuple(row[:_NAMED])] for row in seen.tolist()])
        return told.gather(1, (places - self.task.retrieval_start + 1).clamp(0, self.task.needle_len - 1))


class Echo(Known):
    """Repeats the token at the asked place."""

    def choose(self, seen: Tensor, places: Tensor) -> Tensor:
        return seen.gather(1, places)


def measure(marker: str) -> dict[str, Any]:
    """All figures of both models on one task."""
    source = NeedleSource(NeedleConfig.model_validate({"split": "test", "needle_marker": marker,
                                                       "needle_test_examples": EXAMPLES}))
    found = {}
    for model in (Planted(source), Echo(source)):
        batches = eval_batches(source, rank=0, world=1, batch_size=50)
        reader = Reader(model, torch.device("cpu"), readout=True)
        answers = Answers.of(needle.ask(reader, batches, source.config))
        figures = records(needle.figures(answers, source.config, prefix="test"))
        found[type(model).__name__.lower()] = {name.removeprefix("test/"): record.model_dump(mode="json")
                                               for name, record in figures.items()}
    return found


def main() -> None:
    results = {marker: measure(marker) for marker in ("none", "key")}
    for marker, models in results.items():
        for name, figures in models.items():
            told = ", ".join(f"{key} {figures[key]['value']:.4f}" for key in ("needle_hit_rate", "needle_echo_rate"))
            print(f"marker {marker}, {name}: {told}")
    write_results("needle_metric", results)


if __name__ == "__main__":
    main()
