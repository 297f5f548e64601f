"""Training on needles: L = L_lm + infonce_weight * L_nce + lambda_retrieval * L_ret (AFRB spec, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pretrain.config.objective import NeedleObjectiveConfig
from pretrain.data.batch import Batch
from pretrain.data.bijection import as_keys, derive, stream_key
from pretrain.objectives.base import Schedule, SumResult
from pretrain.objectives.causal_lm import TEMPERATURE

MODEL_INPUTS = ("input_ids", "labels", "readout_positions")


class Needle:
    """Mean over the L answer tokens of each sample, of three terms.

    lm: -log p(answer token), shifted once. nce: InfoNCE of the readout's vector against the output table, positive the
    answer token, negatives drawn for this sample of this step. ret: the same as lm; with `legacy_loss` unshifted, that
    is, read from the position that holds the answer token already.

    Batch: see `NeedleSource.get`. Model: forward takes `readout_positions` [B, L] and `negatives` [B, N] and returns
    `LMOutput` with `terms["nce"]` and `terms["nce_correct"]` as (sum, count).
    """

    def __init__(self, config: NeedleObjectiveConfig) -> None:
        self.config = config
        self.terms: dict[str, float | Schedule] = {"lm": 1.0}
        if config.infonce_weight:
            self.terms["nce"] = config.infonce_weight
        if config.lambda_retrieval:
            self.terms["ret"] = config.lambda_retrieval
        self._key = stream_key("needle/negatives", config.seed)

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the model reads of a batch."""
        return {name: batch[name] for name in MODEL_INPUTS}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Answer tokens, for every term."""
        return dict.fromkeys(self.terms, batch["readout_positions"].numel())

    def __call__(self, model: Callable[..., Any], batch: Batch, controls: Mapping[str, float]) -> SumResult:
        """One forward; with `legacy_loss` a second one."""
        inputs = self.probe_inputs(batch)
        if "nce" in self.terms:
            inputs["negatives"] = draw_negatives(batch, self.config.infonce_negatives, self._key)
            controls = {**controls, TEMPERATURE: self.config.infonce_tau}
        output = model(**inputs, controls=controls)
        sums = {"lm": output.nll_sum}
        metrics = {"lm_loss": (output.nll_sum, output.n_tokens), "accuracy": (output.n_correct, output.n_tokens)}
        if "nce" in self.terms:
            sums["nce"] = output.terms["nce"][0]
            metrics |= {"infonce_loss": output.terms["nce"], "infonce_acc": output.terms["nce_correct"]}
        if "ret" in self.terms:
            second = model(**unshifted(batch), controls=controls) if self.config.legacy_loss else output
            sums["ret"] = second.nll_sum
            metrics["retrieval_loss"] = (second.nll_sum, second.n_tokens)
        return SumResult(sums, metrics)


def unshifted(batch: Batch) -> dict[str, torch.Tensor]:
    """The original's retrieval term: at each answer token's own position, the model is asked for that very token."""
    positions = batch["readout_positions"] + 1
    answer = batch["labels"].gather(1, batch["readout_positions"])
    input_ids = torch.cat([batch["input_ids"], answer[:, -1:]], dim=1)
    labels = torch.full_like(input_ids, -100).scatter(1, positions, answer)
    return {"input_ids": input_ids, "labels": labels, "readout_positions": positions}


def draw_negatives(batch: Batch, count: int, key: int) -> torch.Tensor:
    """[B, count] ids, uniform over the pool without the sample's answer, by (key, place of the sample in the run)."""
    ids = batch.sample_ids.numpy().astype(np.uint64)
    hashes = derive(derive(as_keys(key), ids)[:, None], np.arange(count, dtype=np.uint64)) >> np.uint64(32)
    pool = batch["pool"]
    low, size = pool[:, :1], pool[:, 1:] - pool[:, :1]
    answer = batch["labels"].gather(1, batch["readout_positions"]) - low
    # The k-th excluded id less k: a number drawn below pool - L is moved past the excluded ids that it has reached.
    reached = answer.sort(1).values - torch.arange(answer.shape[1], device=answer.device)
    drawn = torch.from_numpy(hashes.astype(np.int64)).to(pool.device, non_blocking=True)
    drawn = drawn * (size - answer.shape[1]) >> 32
    return low + drawn + torch.searchsorted(reached, drawn, right=True)
