"""`results.json`: what was measured, on what, with what. One file per evaluation, readable by people and by us."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pretrain.config.model import Section
from pretrain.engine.evaluator import EvalResult
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import write_text_atomic

RESULTS = "results.json"


class MetricRecord(Section):
    """One figure with what is needed to read it."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    value: float
    n: int = Field(description="number of things it is computed over")
    higher_is_better: bool
    ci: tuple[float, float] | None = Field(None, description="95% interval; null: not known")


class NGramRecord(Section):
    """One n-gram baseline, evaluated on exactly the tokens of the model."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    order: int = Field(ge=1, le=3)
    scope: Literal["equal tokens", "full split"] = Field(description="trained on the tokens of the model, or on all")
    train_tokens: int = Field(description="labelled tokens it was trained on")
    loss: float = Field(description="nats a token")
    perplexity: float
    bits_per_byte: float | None = Field(None, description="null: the bytes of the tokens are not known")
    n: int = Field(description="labelled tokens it was evaluated on")

    @property
    def label(self) -> str:
        """Name for tables: `bigram, equal tokens`."""
        return f"{('unigram', 'bigram', 'trigram')[self.order - 1]}, {self.scope}"


class TextSample(Section):
    """One text that the model continued."""

    prompt: str
    text: str = Field(description="the continuation, without the prompt")


class Results(Section):
    """Everything about one evaluation."""

    format: Literal[1] = 1
    task: str
    task_version: int = Field(description="raised whenever the figure of a task would change on equal input")
    metrics: dict[str, MetricRecord]
    passed: bool | None = Field(None, description="verdict, where the task has one")
    failure: str | None = Field(None, description="what did not pass, in a few words")
    baselines: list[NGramRecord] = Field(default_factory=list)
    samples: list[TextSample] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict, description="whatever else the task found")
    target: str = Field(description="what was evaluated, as given")
    model: dict[str, Any] = Field(default_factory=dict, description="family, parameters")
    step: int | None = Field(None, description="optimizer updates of the evaluated weights")
    train_tokens: int | None = Field(None, description="tokens the model was trained on, repeats included")
    weights_sha256: str | None = Field(None, description="hash of the checkpoint's manifest or of the weights file")
    dataset: dict[str, Any] = Field(default_factory=dict, description="path, split, fingerprint")
    dtype: str = Field(description="dtype of weights and activations")
    batch_size: int
    seed: int
    host: dict[str, Any] = Field(default_factory=dict)
    command: str
    created: str = Field(description="UTC, ISO 8601")

    @property
    def prefix(self) -> str:
        """What the names of the metrics begin with: `val`, or the split."""
        return next(iter(self.metrics), "").partition("/")[0]

    def write(self, folder: Path) -> Path:
        """Write `folder`/results.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RESULTS
        write_text_atomic(path, self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read it back. Raises DataCorruption naming the file and the field."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise DataCorruption(f"{path}: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}") from None


def leading(results: Iterable[Results]) -> Results | None:
    """The evaluation that speaks for a run: validation of the newest weights, with baselines, on the most tokens."""
    found = [r for r in results if r.task == "perplexity" and "val/loss" in r.metrics]
    return max(found, key=lambda r: (r.step or 0, bool(r.baselines), r.metrics["val/loss"].n, r.created), default=None)


def records(result: EvalResult) -> dict[str, MetricRecord]:
    """The metrics of an evaluator as they are stored; an interval of unknown ends becomes null."""
    def known(ci: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ci is None or any(math.isnan(end) for end in ci) else ci
    return {name: MetricRecord(value=m.value, n=m.n, higher_is_better=m.higher_is_better, ci=known(m.ci))
            for name, m in result.metrics.items()}
