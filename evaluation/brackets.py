"""Perplexity of a model beside the models it is made of: the brackets of any such claim (AFRB spec, section 19)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evaluation.needle_controls import SWITCHES
from evaluation.needle_variants import variants
from evaluation.perplexity import figures, tally
from evaluation.target import Target
from pretrain.data.batch import Batch
from pretrain.engine.evaluator import Metric


def bracketed(target: Target, batches: Sequence[Batch], seed: int = 0) -> Iterator[tuple[str, str, Metric]]:
    """(name, meaning, perplexity) of the untouched backbone and its like, and of the model with its memory off.

    All on the same batches. What the target's schema does not know, or is already, is left out; so is attention where
    the backbone's is not at hand, or does not take rows of this length.
    """
    def measured(forward: Any) -> Metric:
        sums = tally(forward, batches, target.device)
        return figures(sums, has_bytes=False, seed=seed).metrics["val/perplexity"]

    for name in getattr(target.model, "evaluation_controls", ()):
        if name in ("memory_zero", "readout_off"):
            yield name, SWITCHES[name][0], measured(partial(target.forward, controls={name: 1.0}))
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    for variant, other in variants(target, longest, sweep=False):
        yield variant.name, variant.meaning, measured(other.forward)
