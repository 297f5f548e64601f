"""Evaluations in the middle of training: when they run, what they decide, how a request to stop cuts them short."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrain.config.interval import Progress
from pretrain.config.run import RunConfig
from pretrain.config.suggest import nearest
from pretrain.engine import rng
from pretrain.engine.build import Engine
from pretrain.engine.evaluator import Evaluator, Metric
from pretrain.engine.reporting import Reporter
from pretrain.engine.schedule import LearningRate
from pretrain.engine.state import RunState
from pretrain.engine.stopping import StopRequests
from pretrain.engine.views import TrainingView
from pretrain.errors import ConfigError
from pretrain.models.base import Hooks

_STOP_EVERY = 8
"""Forward passes between two looks at the requests to stop."""
_log = logging.getLogger("pretrain")


class _CutShort(Exception):
    """A request to stop was agreed on in the middle of an evaluation."""


@dataclass
class Evaluations:
    """Runs evaluators on all ranks without touching training, and draws the conclusions: best, plateau, early stop."""

    config: RunConfig
    engine: Engine
    hooks: Hooks
    lr: LearningRate
    reporter: Reporter
    stop: StopRequests
    done: dict[str, int] = field(default_factory=dict)
    """Step of the last evaluation by evaluator."""

    def run(self, evaluators: Sequence[Evaluator], state: RunState, progress: Progress, *, whole: bool,
            select: bool = True) -> bool:
        """Run `evaluators` (the `whole` list, or those that are due). True where the run's metric improved. Collective.

        Without `select` figures are only written: nothing is drawn from them. Where a request to stop comes in between,
        none of their results counts: they are `owed` by the state.
        """
        controls = self.hooks.controls(state.step)
        results: dict[str, Metric] = {}
        was_training = self.engine.model.training
        with self.reporter.aside("eval"), rng.preserved(), torch.no_grad():
            self.engine.ds.eval()
            try:
                for evaluator in evaluators:
                    view = _StoppableView(self.config, state.step, self.engine, controls, self.stop)
                    results.update(evaluator.evaluate(view).metrics)
            except _CutShort:
                state.owed = [evaluator.name for evaluator in evaluators]
                if self.engine.world.is_main:
                    _log.info("step %d: a request to stop cuts the evaluation short; it is made up for when the run "
                              "goes on", state.step)
                return False
            finally:
                self.engine.ds.train(was_training)
        state.owed = []
        self.done |= {evaluator.name: state.step for evaluator in evaluators}
        self.reporter.evaluation(state, progress, results)
        metric = self.config.eval.metric
        if metric not in results and whole:
            error = ConfigError("eval.metric", f"no evaluation gives {metric}{nearest(metric, results)}; there are "
                                f"{', '.join(sorted(results))}")
            error.agreed = True  # results are equal on all ranks
            raise error
        return select and self._judge(results, state, progress)

    def _judge(self, results: dict[str, Metric], state: RunState, progress: Progress) -> bool:
        """Select, cut the rate on a plateau, stop early."""
        chosen = results.get(self.config.eval.metric)
        if chosen is None:
            return False
        train = self.config.train
        after = train.patience_after
        counts = after is None or progress.in_unit(after.unit) >= after.amount
        waited = state.evaluations_without_improvement
        improved = state.observe(chosen.value, higher_is_better=chosen.higher_is_better,
                                 least_gain=train.patience_delta, counts=counts)
        if self.lr.observe(-chosen.value if chosen.higher_is_better else chosen.value):
            _log.info("plateau: learning-rate factor cut to %g", self.lr.plateau.factor)
        perplexity, told = results.get("val/perplexity"), self.engine.world.is_main
        if train.patience and told and state.evaluations_without_improvement > waited:
            _log.info("[MONITOR] No improvement (%d/%d)", state.evaluations_without_improvement, train.patience)
        if train.patience and state.evaluations_without_improvement >= train.patience:
            state.stopped_early = f"no improvement of {self.config.eval.metric} in {train.patience} evaluations"
            if told:
                _log.info("[MONITOR] EARLY STOPPING TRIGGERED")
        if train.target_perplexity and perplexity and perplexity.value <= train.target_perplexity:
            reached = f"{perplexity.value:.4g} reached {train.target_perplexity:g}"
            state.stopped_early = f"validation perplexity {reached}"
        return improved


class _StoppableView(TrainingView):
    """Looks at requests to stop every few forwards; every rank makes equally many, so all of them end at the same."""

    def __init__(self, config: RunConfig, step: int, engine: Engine, controls: dict[str, float],
                 stop: StopRequests) -> None:
        super().__init__(config, step, engine, controls)
        self._stop = stop
        self._forwards = 0

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """As `TrainingView`. Raises _CutShort, alike on every rank."""
        if self._forwards % _STOP_EVERY == 0 and not self._engine.world.agree(not self._stop.stopping):
            raise _CutShort
        self._forwards += 1
        return super().forward(controls=controls, **inputs)
