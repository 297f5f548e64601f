"""Next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pretrain.config.objective import CausalLMConfig
from pretrain.data.batch import Batch
from pretrain.data.bijection import as_keys, derive, stream_key
from pretrain.data.shards import IGNORE_LABEL
from pretrain.objectives.base import Schedule, SumResult

MODEL_INPUTS = ("input_ids", "labels", "document_ids", "attention_mask")
"""Tensors of a batch that a language model's forward takes; a source need not have all of them."""
TEMPERATURE = "infonce_tau"
"""Control by which the model is told the temperature of InfoNCE."""


class CausalLM:
    """Mean over labelled tokens of -log p(label), plus `z_loss` times the mean squared log-normaliser.

    With `infonce_weight` also that times the mean InfoNCE of what a memory says at some tokens of each sample, drawn by
    the sample's place in the run, against ids drawn likewise (AFRB spec, section 7).

    Labels come shifted from the source; -100 marks positions without one. Model: see `LMOutput`; with InfoNCE its
    forward takes `negatives` [B, N] and `nce_positions` [B, S] and returns `terms["nce"]` and `terms["nce_correct"]` as
    (sum, count).
    """

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config
        self.terms: dict[str, float | Schedule] = {"nll": 1.0}
        if config.z_loss:
            self.terms["z"] = config.z_loss
        if config.infonce_weight:
            self.terms["nce"] = config.infonce_weight
        self._key = stream_key("causal_lm/infonce", config.infonce_seed)

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The language model's own inputs."""
        return {name: batch.tensors[name] for name in MODEL_INPUTS if name in batch.tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Labelled tokens; of InfoNCE, those among the tokens that are drawn."""
        labelled = batch["labels"] != IGNORE_LABEL
        found = dict.fromkeys(self.terms, int(labelled.sum()))
        if "nce" in self.terms:
            found["nce"] = int(labelled.gather(1, self._positions(batch)).sum())
        return found

    def __call__(self, model: Callable[..., Any], batch: Batch, controls: Mapping[str, float]) -> SumResult:
        """One forward."""
        inputs = self.probe_inputs(batch)
        if "nce" in self.terms:
            inputs |= {"nce_positions": self._positions(batch), "negatives": self._negatives(batch)}
            controls = {**controls, TEMPERATURE: self.config.infonce_tau}
        output = model(**inputs, controls=controls)
        sums = {"nll": output.nll_sum}
        metrics = {"accuracy": (output.n_correct, output.n_tokens), "nll": (output.nll_sum, output.n_tokens)}
        if "z" in self.terms:
            sums["z"] = output.terms["z"][0]
        if "nce" in self.terms:
            sums["nce"] = output.terms["nce"][0]
            metrics |= {"infonce_loss": output.terms["nce"], "infonce_acc": output.terms["nce_correct"]}
        return SumResult(sums, metrics)

    def _positions(self, batch: Batch) -> torch.Tensor:
        """[B, S] different tokens of each sample."""
        length = batch["input_ids"].shape[1]
        count = min(self.config.infonce_positions, length)
        ranks = derive(self._of_samples(batch, 0)[:, None], np.arange(length, dtype=np.uint64))
        chosen = np.argpartition(ranks, count - 1, axis=1)[:, :count]
        return torch.from_numpy(np.sort(chosen, axis=1)).to(batch["input_ids"].device)

    def _negatives(self, batch: Batch) -> torch.Tensor:
        """[B, N] numbers below 2^31, which the model takes modulo its vocabulary."""
        places = np.arange(self.config.infonce_negatives, dtype=np.uint64)
        drawn = derive(self._of_samples(batch, 1)[:, None], places) >> np.uint64(33)
        return torch.from_numpy(drawn.astype(np.int64)).to(batch["input_ids"].device)

    def _of_samples(self, batch: Batch, stream: int) -> np.ndarray:
        """[B] keys of one of the two draws."""
        ids = batch.sample_ids.cpu().numpy().astype(np.uint64)
        return derive(derive(as_keys(self._key), ids), as_keys(stream))
