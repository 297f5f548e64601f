"""How evaluation plugs into training: the command line injects evaluators, the engine calls them on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pretrain.config.interval import Interval
from pretrain.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure with what is needed to read it."""

    value: float
    n: int
    """Number of things it is computed over (tokens, pairs, queries)."""
    higher_is_better: bool
    ci: tuple[float, float] | None = None
    """95% interval, where one was computed."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics of one evaluation, equal on every rank."""

    metrics: dict[str, Metric]


class RunView(Protocol):
    """What an evaluator sees of a run."""

    config: RunConfig
    step: int
    rank: int
    world: int
    device: torch.device
    zero_gradients: float | None
    """Share of weight matrices whose gradient was exactly zero in the last update; None where none was looked at."""

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """The model in eval mode without gradient. Collective: every rank calls it the same number of times.

        `controls` come on top of those that the family's hooks give for this step. What it raises is passed on: that is
        how a request to stop cuts an evaluation short, at the same call on every rank.
        """

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""


class Evaluator(Protocol):
    """An evaluation during training. It never changes training: the engine restores RNG and mode around it."""

    name: str
    every: Interval | None

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks; all ranks return the same result."""
