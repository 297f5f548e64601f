"""Needles asked of a finished model: figures, controls, references, distance, verdict; one results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import needle, perplexity
from evaluation.brackets import bracketed
from evaluation.needle import Answers
from evaluation.needle_controls import (
    ITSELF,
    Check,
    Expected,
    applicable,
    batch_check,
    future_check,
    parts,
    run_control,
)
from evaluation.needle_gate import gate_figures
from evaluation.needle_reader import Reader, reads_out
from evaluation.needle_rules import Evidence, findings, line
from evaluation.needle_variants import left_out, variants
from evaluation.offline import DEFAULT_BATCH_SIZE, Request, about, open_data
from evaluation.results import MetricRecord, Results, records
from evaluation.target import Target, open_target
from evaluation.verdict import decide
from pretrain.config.merge import SET, Layered, apply_sets
from pretrain.config.model import Section
from pretrain.config.needle import NeedleConfig
from pretrain.config.problems import collect
from pretrain.config.source import DataConfig
from pretrain.data.needle import NeedleSource
from pretrain.data.open import eval_batches, spread
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.errors import ConfigErrors, UserError
from pretrain.metrics.needle import Predictions, Rate, by_distance, hits_needed, needle_rates
from pretrain.monitor.rows import read_metrics

CONTROL_EXAMPLES = 200
"""Needles of each control where more are asked for the figure itself."""
GATE_EXAMPLES = 20
"""Needles on which a write gate is looked at."""
DISTANCE_BINS = 8
_KEY = "data.source."


class _Changed(Section):
    """The part of a run config that a needle evaluation looks at."""

    data: DataConfig


def needle_task(target: Target, split: str, sets: Sequence[str]) -> NeedleConfig:
    """The task of the target's run on another split, with `sets` ("data.source.KEY=VALUE") on top.

    Without a needle run it is the default task on the target's vocabulary. Raises UserError for other keys, and where
    vocabulary or length do not fit the model.
    """
    if target.kind == "config":  # what it is changed by, its task has already
        sets = ()
    for text in sets:
        if not text.startswith(_KEY) or "=" not in text:
            raise UserError(f"--set {text}: here only the task is changed, as {_KEY}needle_marker=key")
    values: dict[str, Any] = {"kind": "needle", "vocab_size": target.vocab_size}
    if target.config is not None and isinstance(target.config.data.source, NeedleConfig):
        values = target.config.data.source.model_dump()
    layered = Layered()
    layered.overlay(_Changed, {"data": {"source": {**values, "split": split}}}, str(target.path), {})
    problems = apply_sets(layered, _Changed, sets)
    changed, found = collect(lambda: _Changed.model_validate(layered.values), _Changed, layered, SET)
    if problems or found:
        raise ConfigErrors([*problems, *found])
    task: NeedleConfig = changed.data.source
    if not task.needle_query:
        raise UserError(f"{target.path}: its task has no query, so nothing is asked; --set {_KEY}needle_query=true")
    if task.vocab_size > target.vocab_size:
        raise UserError(f"{_KEY}vocab_size {task.vocab_size}: the model knows {target.vocab_size} ids")
    _check_length(target, target.path, task)
    return task


def _check_length(target: Target, name: Path | str, task: NeedleConfig) -> None:
    if target.max_seq_len is not None and task.seq_len + 1 > target.max_seq_len:
        raise UserError(f"{_KEY}ctx_chunks {task.ctx_chunks}: {task.seq_len + 1} tokens are more than the "
                        f"{target.max_seq_len} that the model of {name} takes")


def evaluate_needle(target: Target, request: Request, command: list[str]) -> Results:
    """Figures on split test (or `request.split`), and with `request.controls` everything that makes them believable.

    Raises UserError where the target is no causal language model or does not fit the task.
    """
    if target.config is not None and target.config.model.kind != "causal_lm":
        raise UserError(f"{target.path}: task needle needs a causal language model, this is an "
                        f"{target.config.model.kind}")
    split = request.split or "test"
    source = NeedleSource(needle_task(target, split, request.sets))
    asked = _Asked(target, source, request)
    result = needle.figures(asked.answers, source.config, prefix=split, seed=request.seed)
    rates = needle_rates(asked.answers.predictions, source.config.eval_soft_topk, seed=request.seed)
    metrics, details = records(result), asked.details()
    null = asked.null_adapter()
    controls: dict[str, Rate] = {}
    if request.controls:
        controls = asked.add_controls(details)
        asked.add_references(details)
        details["checks"] = [asdict(check) for check in asked.checks()]
        details["distance"] = asked.distance()
        details["write_gate"] = gate_figures(target, source, asked.ids[:GATE_EXAMPLES], asked.batch_size)
        details["perplexity"] = asked.perplexities()
    verdict = decide(rates["needle_hit_rate"], needle.nulls(source.config), examples=len(asked.ids),
                     shuffled=controls.get("shuffled_needle"), null_adapter=null)
    rows = [*details["controls"], *details["references"]]
    failed = {row["name"]: row["value"] for row in rows if row["passed"] is False}
    details |= {"verdict": asdict(verdict), "headlines": needle.headlines(rates, source.config),
                "findings": asked.findings(rates, result, failed, split)}
    if null is not None:
        details["controls"].insert(0, _row("null_adapter", f"trained alike without a memory: {request.null}",
                                           "reported", null, None))
    for row in details["controls"]:
        metrics[f"{split}/control/{row['name']}"] = MetricRecord(value=row["value"], n=row["n"], ci=row["ci"],
                                                                 higher_is_better=False)
    wrong = [*failed, *(check["name"] for check in details.get("checks", ()) if not check["passed"]),
             *("H2" for text in details["findings"] if text.startswith("[DIAG:H2]"))]
    return Results(task=needle.TASK, task_version=needle.VERSION, metrics=metrics, details=details,
                   passed=False if wrong else None, failure=f"a leak: {', '.join(wrong)}" if wrong else None,
                   batch_size=asked.batch_size, seed=request.seed,
                   dataset={"split": split, "fingerprint": source.fingerprint, "seq_len": source.config.seq_len,
                            "windows": len(asked.ids)}, **about(target, command))


def _row(name: str, meaning: str, expected: str, rate: Rate, passed: bool | None, bag: float | None = None
         ) -> dict[str, Any]:
    return {"name": name, "meaning": meaning, "expected": expected, "value": rate.value, "hits": rate.hits,
            "n": rate.n, "ci": rate.ci, "bag": bag, "passed": passed}


class _Asked:
    """One target and one set of examples."""

    def __init__(self, target: Target, source: NeedleSource, request: Request) -> None:
        self.target, self.source, self.request = target, source, request
        self.task = source.config
        self.batch_size = request.batch_size or DEFAULT_BATCH_SIZE
        self.ids = spread(len(source), request.max_windows or len(source))
        self.few = self.ids[:CONTROL_EXAMPLES]
        self.reader = _reader(target)
        self.answers = self._ask(self.reader, source, len(self.ids))

    def _ask(self, reader: Reader, source: NeedleSource, count: int) -> Answers:
        batches = eval_batches(source, rank=0, world=1, batch_size=self.batch_size, max_samples=count)
        return Answers.of(needle.ask(reader, batches, source.config))

    def details(self) -> dict[str, Any]:
        """What every result says."""
        task = self.task
        return {"task": task.model_dump(mode="json"), "examples": len(self.ids), "min_distance": task.min_distance,
                "nulls": {"top_1": asdict(needle.nulls(task)),
                          f"top_{task.eval_soft_topk}": asdict(needle.nulls(task, task.eval_soft_topk))},
                "hits_above_nulls": {name: hits_needed(self.answers.predictions.hits.size, p)
                                     for name, p in asdict(needle.nulls(task)).items()},
                "controls": [], "references": []}

    def null_adapter(self) -> Rate | None:
        """Free-running hit rate of the run that `request.null` names, on the same examples."""
        other = self.null
        if other is None:
            return None
        if other.vocab_size != self.target.vocab_size:
            raise UserError(f"{self.request.null}: has {other.vocab_size} token ids, {self.target.path} "
                            f"{self.target.vocab_size}: it is no null of this model")
        _check_length(other, str(self.request.null), self.task)
        return Rate.of(self._free(_reader(other), self.ids).hits)

    @cached_property
    def null(self) -> Target | None:
        """The model of the run that `request.null` names."""
        if self.request.null is None:
            return None
        return open_target(self.request.null, dtype=self.target.dtype, device=self.target.device)

    def _free(self, reader: Reader, ids: np.ndarray) -> Predictions:
        return run_control(reader, self.source, ids, ITSELF, self.batch_size)

    def add_controls(self, details: dict[str, Any]) -> dict[str, Rate]:
        """Run every control that applies. Returns the rates by name."""
        found = {}
        switches = getattr(self.target.model, "evaluation_controls", ())
        for control in applicable(self.task, switches):
            predictions = run_control(self.reader, self.source, self.few, control, self.batch_size)
            rate = Rate.of(predictions.hits)
            details["controls"].append(_row(control.name, control.meaning, control.expected, rate,
                                            self._at_null(rate, control.expected),
                                            float(predictions.in_bag.mean())))
            found[control.name] = rate
        return found

    def _at_null(self, rate: Rate, expected: Expected) -> bool | None:
        """Whether a rate is no higher than the null it is held to; None where there is none."""
        bound = getattr(needle.nulls(self.task), expected, None)
        if bound is None:
            return None
        return rate.at_uniform_chance(bound) if expected == "uniform" else rate.at_chance(bound)

    def add_references(self, details: dict[str, Any]) -> None:
        """The same weights with attention, without adapter, without either; and which of these cannot be asked."""
        length = self.task.seq_len + 1
        details["left_out"] = left_out(self.target, length)
        for variant, other in variants(self.target, length):
            rate = Rate.of(self._free(_reader(other), self.few).hits)
            details["references"].append(_row(variant.name, variant.meaning, variant.expected, rate,
                                              self._at_null(rate, variant.expected)))
        for _, other in variants(self.null, length, only="attention_on") if self.null is not None else ():
            rate = Rate.of(self._free(_reader(other), self.few).hits)
            details["references"].append(_row("null_adapter_attention_on", "the null adapter with the backbone's "
                                              "attention", "reported", rate, None))

    def checks(self) -> list[Check]:
        """Causality and independence of the batch, on four examples."""
        return [check(self.reader, self.source, self.ids[:4]) for check in (future_check, batch_check)]

    def distance(self) -> list[dict[str, Any]]:
        """Hit rate by the tokens between needle and answer, with needles anywhere in the context."""
        anywhere = NeedleSource(self.task.model_copy(update={"placement": "uniform"}))
        hits, distances = [], []
        for ids in parts(self.ids, self.batch_size):
            rows = anywhere.rows(ids)
            distances.append(self.task.retrieval_start - 1 - (rows.start + self.task.needle_len - 1))
            hits.append(run_control(self.reader, anywhere, ids, ITSELF, len(ids)).hits)
        bins = by_distance(np.concatenate(hits), np.concatenate(distances), DISTANCE_BINS)
        return [{"low": b.low, "high": b.high, "value": b.rate.value, "ci": b.rate.ci, "n": b.rate.n} for b in bins]

    def perplexities(self) -> dict[str, float]:
        """Of this model and of its references on `--data`, where that is given."""
        if self.request.data is None:
            return {}
        source, _ = open_data(self.target, self.request)
        batches = list(eval_batches(source, rank=0, world=1, batch_size=self.batch_size,
                                    max_samples=self.request.max_windows))
        own = perplexity.figures(perplexity.tally(self.target.forward, batches, self.target.device), has_bytes=False)
        return {"this model": own.metrics["val/perplexity"].value,
                **{name: metric.value for name, _, metric in bracketed(self.target, batches)}}

    def findings(self, rates: dict[str, Rate], result: EvalResult, failed: dict[str, float], split: str
                 ) -> list[str]:
        """What the rules say, as lines of a log; they need the run's config."""
        config, folder = self.target.config, self.target.run_folder
        if config is None:
            return []
        step = self.target.checkpoint.step if self.target.checkpoint else 0
        rows = read_metrics(folder) if folder is not None else []
        loss: Metric = result.metrics[f"{split}/loss"]
        evidence = Evidence(step, rates, needle.nulls(self.task), self.task, config, loss.value, rows,
                            self.request.controls, failed)
        return [line(finding) for finding in findings(evidence)]


def _reader(target: Target) -> Reader:
    return Reader(target.forward, target.device, reads_out(target.config))
