"""Figures of phases and memories during training (AFRB spec, section 11), where a forward measures itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pretrain.config.interval import Interval
from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.open import eval_batches, open_validation
from pretrain.engine.evaluator import EvalResult, Metric, RunView
from pretrain.metrics.phase import phase_figures, trace_curvature

SEQUENCES = 4
_INPUTS = ("input_ids", "document_ids", "attention_mask", "readout_positions")


def measures_phases(config: RunConfig) -> bool:
    """Whether the model's forward has `diagnostics`, and they are wanted."""
    return getattr(config.model, "skip_phase_metrics", True) is False


class PhaseEvaluator:
    """Phase figures on the first validation sequences; every rank computes the same."""

    name = "phase"

    def __init__(self, every: Interval | None) -> None:
        self.every = every
        self._source: SampleSource | None = None

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks. Figures describe; none is better for being high."""
        if self._source is None:
            self._source = open_validation(view.config)
        assert self._source is not None  # there is no evaluator without validation data
        source = self._source
        batch = source.get(np.arange(min(SEQUENCES, len(source)), dtype=np.int64))
        found = phase_figures(measured(view, batch))
        if getattr(view.config.model, "phase_curvature_metrics", False):
            found |= self._curvature(view, source)
        return EvalResult({f"val/{name}": Metric(value, len(batch), False) for name, value in found.items()})

    def _curvature(self, view: RunView, source: SampleSource) -> dict[str, float]:
        """Means over all validation examples that have a needle."""
        rows = []
        for batch in eval_batches(source, rank=0, world=1, batch_size=SEQUENCES):
            traces = measured(view, batch).get("traces")
            if traces is None or "readout_positions" not in batch.tensors:
                return {}
            for row in torch.flatnonzero(batch.sample_ids >= 0).tolist():
                positions = batch["readout_positions"][row]
                bend = trace_curvature(traces[-1, row], int(batch["needle_start"][row]), len(positions),
                                       int(positions[0]))
                rows.append((bend.peak, bend.needle_ratio, bend.before_readout, bend.entropy))
        means = np.mean(rows, axis=0)
        names = ("curvature_peak", "curvature_needle_ratio", "curvature_before_readout", "curvature_entropy")
        return dict(zip(names, means.tolist(), strict=True))


def measured(view: RunView, batch: Batch) -> Mapping[str, torch.Tensor]:
    """The diagnostics of one forward."""
    inputs = {name: batch.tensors[name].to(view.device) for name in _INPUTS if name in batch.tensors}
    with torch.no_grad():
        found: Mapping[str, torch.Tensor] = view.forward(**inputs, diagnostics=True).diagnostics
    return found
