"""Prediction of hidden tokens (Devlin et al. 2019, arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.config.objective import MaskedLMConfig
from pretrain.data.batch import Batch
from pretrain.data.bijection import as_keys, derive, stream_key
from pretrain.objectives.base import Schedule, SumResult

IGNORE = -100
WINDOWS, PASSAGES = ("input_ids", "attention_mask", "document_ids"), ("positive_input_ids", "positive_attention_mask")


class MaskedLM:
    """Mean over hidden tokens of -log p(token).

    Which tokens of a sample are hidden, and what stands in their place, follows from the seed and the sample's place in
    the run: others in every epoch, the same for any split of the batch. Batches of windows give their tokens, batches
    of pairs their positives. Model: forward takes `labels` and returns `LMOutput`.
    """

    def __init__(self, config: MaskedLMConfig) -> None:
        self.config = config
        self.terms: dict[str, float | Schedule] = {"mlm": 1.0}
        self._key = stream_key("masked_lm", config.seed)
        special = {*config.special_ids, config.mask_id}
        self._replacements = torch.tensor([i for i in range(config.vocab_size) if i not in special])

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The model's inputs: hidden tokens, labels, and what keeps texts apart."""
        return self._hidden(batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden tokens."""
        return {"mlm": int((self._hidden(batch)["labels"] != IGNORE).sum())}

    def __call__(self, model: Callable[..., Any], batch: Batch, controls: Mapping[str, float]) -> SumResult:
        """One forward."""
        output = model(**self._hidden(batch), controls=controls)
        return SumResult({"mlm": output.nll_sum}, {"accuracy": (output.n_correct, output.n_tokens),
                                                   "mlm": (output.nll_sum, output.n_tokens)})

    def _hidden(self, batch: Batch) -> dict[str, torch.Tensor]:
        """input_ids with tokens hidden, labels (-100 where nothing is to be said), mask and document ids."""
        windows = "input_ids" in batch.tensors
        names = WINDOWS if windows else PASSAGES
        inputs = {name.removeprefix("positive_"): batch[name] for name in names if name in batch.tensors}
        tokens = inputs["input_ids"]
        chance, kind, which = (torch.from_numpy(draw).to(tokens.device) for draw in self._draws(batch, tokens.shape[1]))
        special = torch.tensor((*self.config.special_ids, self.config.mask_id), device=tokens.device)
        chosen = (chance < self.config.rate) & ~torch.isin(tokens, special)
        if "attention_mask" in inputs:
            chosen &= inputs["attention_mask"].bool()
        masked = kind < self.config.mask_share
        changed = ~masked & (kind < self.config.mask_share + self.config.random_share)
        others = self._replacements.to(tokens.device)
        other = others[(which * len(others)).long()]
        hidden = torch.where(masked, self.config.mask_id, torch.where(changed, other, tokens))
        return {**inputs, "input_ids": torch.where(chosen, hidden, tokens),
                "labels": torch.where(chosen, tokens, IGNORE)}

    def _draws(self, batch: Batch, length: int) -> tuple[NDArray[Any], ...]:
        """Three uniform numbers in [0, 1) for each token [B, T]."""
        samples = derive(as_keys(self._key), batch.sample_ids.numpy().astype(np.uint64))
        tokens = derive(samples[:, None], np.arange(length, dtype=np.uint64))
        return tuple((derive(tokens, np.full(1, number, np.uint64)) >> np.uint64(11)) * 2.0**-53 for number in range(3))
