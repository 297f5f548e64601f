"""Task `needle`: does the model give back what was hidden in its context? (AFRB spec, sections 9.2 and 19)

The same functions serve evaluation during training (all ranks) and afterwards (one process). An answer is read
free-running, the model fed with its own tokens; what it does when fed the right ones is reported apart, and so is the
rate at which it merely repeats the token it is looking at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.needle_reader import READOUT_OFF, Reader, nll, ranks, reads_out
from evaluation.needle_rules import Evidence, findings, line
from evaluation.perplexity import max_samples
from pretrain.config.interval import Interval
from pretrain.config.needle import NeedleConfig
from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.needle import NeedleSource
from pretrain.data.open import PADDING_ID, eval_batches, open_validation
from pretrain.engine.evaluator import EvalResult, Metric, RunView
from pretrain.errors import ConfigError
from pretrain.metrics.intervals import cluster_bootstrap
from pretrain.metrics.lm import token_weighted_loss
from pretrain.metrics.needle import Nulls, Predictions, Rate, needle_rates
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.layout import RunFolder

TASK, VERSION = "needle", 1
PREFIX = "val"
ROWS = 8
"""Examples a forward where the run's micro-batch is smaller: without gradients there is room."""
LOWER_IS_BETTER = ("needle_echo_rate", "echo_rate_haystack")
Columns = dict[str, np.ndarray]
"""Arrays [N, k] by name, a row an example."""
_log = logging.getLogger("pretrain")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answered to N examples, in the order of their ids."""

    start: np.ndarray
    """[N] place of the needle in the context."""
    nll: np.ndarray
    """[N] negative log-likelihood of the L answer tokens, teacher-forced, in nats."""
    predictions: Predictions

    @classmethod
    def of(cls, columns: Columns) -> Answers:
        """From the columns of `ask`; rows that only fill up a batch are dropped."""
        kept = np.flatnonzero(columns["id"][:, 0] != PADDING_ID)
        kept = kept[np.argsort(columns["id"][kept, 0], kind="stable")]
        rows = {name: values[kept] for name, values in columns.items()}
        whole = {name: rows[name].astype(np.int64) for name in ("needle", "free", "rank") if name in rows}
        predictions = Predictions(whole["needle"], whole["free"], whole.get("rank"),
                                  rows["echo"] == 1 if "echo" in rows else None,
                                  rows["echo_haystack"] == 1 if "echo_haystack" in rows else None)
        return cls(rows["start"][:, 0], rows["nll"][:, 0], predictions)


def ask(reader: Reader, batches: Iterable[Batch], task: NeedleConfig) -> Columns:
    """Everything about each example of batches made by `NeedleSource.get`; rows that fill up have id -1."""
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in _ask(reader, batch, task).items():
            found.setdefault(name, []).append(values.double().numpy().reshape(len(batch), -1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _ask(reader: Reader, batch: Batch, task: NeedleConfig) -> dict[str, Tensor]:
    tokens, positions = batch["input_ids"], batch["readout_positions"]
    needle = batch["labels"].gather(1, positions)
    logits = reader.at(tokens, positions)
    wanted = needle.clamp_min(0).to(logits.device)
    return {"id": batch.sample_ids, "start": batch["needle_start"], "needle": needle,
            "free": reader.free(tokens[:, :task.retrieval_start], task.needle_len, task.vocab_size),
            "rank": ranks(logits[..., :task.vocab_size], wanted).cpu(), "nll": nll(logits, wanted).sum(1).cpu(),
            **echoes(reader, batch, task)}


def echoes(reader: Reader, batch: Batch, task: NeedleConfig) -> dict[str, Tensor]:
    """1 where the first choice at a place is the token that stands there: at the needle, and as far after it.

    The original took the first for retrieval; equal rates in both say that it is none. The readout is left out, as the
    original's evaluation left it out.
    """
    bare = Reader(reader.forward, reader.device, reader.readout, {**reader.controls, READOUT_OFF: 1.0})
    length, start = task.needle_len, batch["needle_start"][:, None]
    others = min(length, task.context_len - length - task.marker_len)
    places = torch.cat([start + torch.arange(length), (start + length + torch.arange(others)) % task.context_len], 1)
    tokens = batch["input_ids"][:, :task.context_len]
    inside = places.clamp_max(tokens.shape[1] - 1)  # without a query the last context token is never fed
    hits = (bare.in_parts(tokens, inside, task.vocab_size) == tokens.gather(1, inside)).long()
    return {"echo": hits[:, :length], "echo_haystack": hits[:, length:]}


def figures(answers: Answers, task: NeedleConfig, *, prefix: str = PREFIX, seed: int = 0) -> EvalResult:
    """All metrics of a set of answers with intervals over examples."""
    rates = needle_rates(answers.predictions, task.eval_soft_topk, seed=seed)
    metrics = {f"{prefix}/{name}": as_metric(rate, name not in LOWER_IS_BETTER) for name, rate in rates.items()}
    hit, length = rates["needle_hit_rate"], task.needle_len
    metrics[f"{prefix}/avg_correct_tokens_per_needle"] = Metric(
        length * hit.value, hit.n // length, True, (length * hit.ci[0], length * hit.ci[1]))
    tokens = np.full(len(answers.nll), length)
    ci = cluster_bootstrap(answers.nll, tokens, seed=seed) if np.isfinite(answers.nll).all() else None
    metrics[f"{prefix}/loss"] = Metric(token_weighted_loss(answers.nll, tokens), int(tokens.sum()), False, ci)
    return EvalResult(metrics)


def as_metric(rate: Rate, higher_is_better: bool = True) -> Metric:
    """A rate as the engine reports it."""
    return Metric(rate.value, rate.n, higher_is_better, rate.ci)


def nulls(task: NeedleConfig, top_k: int = 1) -> Nulls:
    """What guessers reach on this task."""
    return Nulls.of(pool_size=task.pool_size, context_len=task.context_len, needle_len=task.needle_len, top_k=top_k)


def gathered(view: RunView, own: Columns) -> Columns:
    """The columns of all ranks, on every rank. All have equally many rows."""
    names = list(own)
    widths = np.cumsum([own[name].shape[1] for name in names])
    flat = np.concatenate([own[name] for name in names], axis=1)
    device = torch.device("cpu") if view.device.type == "mps" else view.device  # MPS has no float64
    everyone = torch.zeros(view.world, *flat.shape, dtype=torch.float64, device=device)
    everyone[view.rank] = torch.from_numpy(flat)  # rows of other ranks are zero: adding up gathers
    rows = view.all_reduce(everyone).cpu().numpy().reshape(-1, flat.shape[1])
    return dict(zip(names, np.split(rows, widths[:-1], axis=1), strict=True))


class NeedleEvaluator:
    """Needles of split `val` during training, the same at every evaluation."""

    name = TASK

    def __init__(self, every: Interval | None, max_batches: int | None = None) -> None:
        """`max_batches`: global batches an evaluation, spread over the split; None: all examples."""
        self.every = every
        self.max_batches = max_batches
        self._source: NeedleSource | None = None

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks; each asks for its share of the examples."""
        source = self._open(view.config)
        task, batch = source.config, view.config.batch.resolve(view.world)
        batches = eval_batches(source, rank=view.rank, world=view.world, batch_size=max(ROWS, batch.micro_batch_size),
                               max_samples=max_samples(self.max_batches, batch.global_batch_size))
        reader = Reader(view.forward, view.device, reads_out(view.config))
        if not task.needle_query:
            return self._echo_only(view, reader, batches, task)
        answers = Answers.of(gathered(view, ask(reader, batches, task)))
        result = figures(answers, task)
        if view.rank == 0:
            self._tell(view, answers, task, result)
        return result

    def _open(self, config: RunConfig) -> NeedleSource:
        if self._source is None:
            source = open_validation(config)
            if not isinstance(source, NeedleSource):
                raise ConfigError("data.validation", "needles are evaluated on kind needle; leave it out, or use that")
            self._source = source
        return self._source

    def _echo_only(self, view: RunView, reader: Reader, batches: Iterable[Batch], task: NeedleConfig) -> EvalResult:
        """Without a query nothing can be retrieved."""
        found: dict[str, list[np.ndarray]] = {}
        for batch in batches:
            for name, values in {"id": batch.sample_ids[:, None], **echoes(reader, batch, task)}.items():
                found.setdefault(name, []).append(values.double().numpy())
        columns = gathered(view, {name: np.concatenate(parts) for name, parts in found.items()})
        kept = columns["id"][:, 0] != PADDING_ID
        names = {"needle_echo_rate": "echo", "echo_rate_haystack": "echo_haystack"}
        return EvalResult({f"{PREFIX}/{name}": as_metric(Rate.of(columns[column][kept] == 1), False)
                           for name, column in names.items()})

    def _tell(self, view: RunView, answers: Answers, task: NeedleConfig, result: EvalResult) -> None:
        """The lines of the log, and what the rules make of the figures."""
        rates = needle_rates(answers.predictions, task.eval_soft_topk)
        for text in headlines(rates, task):
            _log.info("%s", text)
        folder = RunFolder(Path(view.config.runs_dir) / view.config.name)
        evidence = Evidence(view.step, rates, nulls(task), task, view.config, result.metrics[f"{PREFIX}/loss"].value,
                            read_metrics(folder))
        for finding in findings(evidence):
            _log.warning("%s", line(finding))


def headlines(rates: Mapping[str, Rate], task: NeedleConfig) -> list[str]:
    """`[NEEDLE-EVAL] Exact hit rate: 0.105 (336/3200)` and the line of the top k."""
    names = [("Exact hit rate", "needle_hit_rate"), (f"Top-{task.eval_soft_topk} hit rate", "needle_hit_rate_topk"),
             ("Teacher-forced hit rate", "needle_hit_rate_tf"), ("Echo rate", "needle_echo_rate")]
    return [f"[NEEDLE-EVAL] {label}: {rates[name].value:.3f} ({rates[name].hits}/{rates[name].n})"
            for label, name in names if name in rates]
