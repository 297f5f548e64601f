"""Texts written during training: the same prompts at every evaluation, so that progress can be read."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from evaluation.generate import Limits, generate
from evaluation.results import Results, TextSample
from evaluation.sampling import Sampling
from evaluation.target import dataset_tokenizer
from pretrain.config.interval import Interval
from pretrain.data.batch import SampleSource
from pretrain.data.open import open_validation
from pretrain.engine.evaluator import EvalResult, RunView
from pretrain.errors import ConfigError

TASK, VERSION = "samples", 1
PROMPT_TOKENS, NEW_TOKENS = 32, 96
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def prompts(source: SampleSource, count: int, tokens: int) -> list[list[int]]:
    """The first `tokens` ids of `count` windows spread evenly over a source."""
    count = min(count, len(source))
    ids = np.arange(count, dtype=np.int64) * len(source) // max(1, count)
    found: list[list[int]] = source.get(ids)["input_ids"][:, :tokens].tolist()
    return found


class SamplesEvaluator:
    """Continues the beginnings of validation windows and writes them to RUN/eval/step-N-samples/results.json.

    Every rank decodes the same texts, each the same number of steps: forward is collective where weights are
    partitioned. There is no metric in it.
    """

    name = TASK

    def __init__(self, every: Interval | None, count: int, eval_dir: Path) -> None:
        """`count`: texts an evaluation; `eval_dir`: of the run folder."""
        self.every = every
        self.count = count
        self.eval_dir = eval_dir

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks; rank 0 writes."""
        config = view.config
        source = open_validation(config)
        tokenizer, _, eos_id = dataset_tokenizer(config)
        if source is None or tokenizer is None:
            raise ConfigError("eval.samples", "texts need a prepared dataset with a tokenizer and a val split; use 0")
        limit = config.model.max_seq_len
        given = prompts(source, self.count, min(PROMPT_TOKENS, (limit or PROMPT_TOKENS + 1) - 1))
        new = generate(view.forward, given, Limits(NEW_TOKENS, eos_id, limit, fixed_length=True), SAMPLING,
                       vocab_size=config.model.vocab_size, device=view.device)
        if view.rank == 0:
            texts = [TextSample(prompt=tokenizer.decode(p), text=tokenizer.decode(t))
                     for p, t in zip(given, new, strict=True)]
            Results(task=TASK, task_version=VERSION, metrics={}, samples=texts, target=config.name, step=view.step,
                    dtype=config.engine.precision, batch_size=len(given), seed=SAMPLING.seed,
                    command=shlex.join(sys.argv), created=datetime.now(UTC).isoformat(timespec="seconds"),
                    ).write(self.eval_dir / f"step-{view.step}-{TASK}")
        return EvalResult({})
