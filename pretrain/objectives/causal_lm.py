"""Next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pretrain.config.objective import CausalLMConfig
from pretrain.data.batch import Batch
from pretrain.objectives.base import Schedule, SumResult

MODEL_INPUTS = ("input_ids", "labels", "document_ids", "attention_mask")
"""Tensors of a batch that a language model's forward takes; a source need not have all of them."""


class CausalLM:
    """Mean over labelled tokens of -log p(label), plus `z_loss` times the mean squared log-normaliser.

    Labels come shifted from the source; -100 marks positions without one. Model: see `LMOutput`.
    """

    def __init__(self, config: CausalLMConfig) -> None:
        self.terms: dict[str, float | Schedule] = {"nll": 1.0}
        if config.z_loss:
            self.terms["z"] = config.z_loss

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The language model's own inputs."""
        return {name: batch.tensors[name] for name in MODEL_INPUTS if name in batch.tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Labelled tokens, for every term."""
        tokens = int((batch["labels"] != -100).sum())
        return dict.fromkeys(self.terms, tokens)

    def __call__(self, model: Callable[..., Any], batch: Batch, controls: Mapping[str, float]) -> SumResult:
        """One forward."""
        output = model(**self.probe_inputs(batch), controls=controls)
        sums = {"nll": output.nll_sum}
        if "z" in self.terms:
            sums["z"] = output.terms["z"][0]
        return SumResult(sums, {"accuracy": (output.n_correct, output.n_tokens),
                                "nll": (output.nll_sum, output.n_tokens)})
