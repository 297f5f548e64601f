"""The one training loop, for all families and objectives.

A step: agree on requests and token counts (one small host-side all-reduce), run the update, advance the cursor, then
fire what is due: evaluation, checkpoint, log. Every rank takes the same way through it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config.interval import Progress
from pretrain.config.load import load_run_config
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import Update as LoadedUpdate
from pretrain.data.loader import UpdateLoader
from pretrain.engine import checkpoint, rng
from pretrain.engine.build import Engine
from pretrain.engine.evaluator import Evaluator, Metric
from pretrain.engine.keeping import Keeper
from pretrain.engine.reporting import Reporter
from pretrain.engine.schedule import LearningRate
from pretrain.engine.state import RunState
from pretrain.engine.stopping import EVAL, RELOAD, SAVE, STOP, StopRequests
from pretrain.engine.update import Update, local_counts, run_full_update, run_sum_update
from pretrain.engine.views import FamilyStepContext, TrainingView
from pretrain.errors import ExitCode
from pretrain.models.base import Hooks
from pretrain.monitor.health import Health
from pretrain.monitor.profiler import StepProfiler
from pretrain.objectives.base import SumObjective

_BITS = (SAVE, STOP, EVAL, RELOAD)
_log = logging.getLogger("pretrain")


@dataclass
class Trainer:
    """A run that is ready to go: everything is built, loaded and agreed."""

    config: RunConfig
    batch: ResolvedBatch
    engine: Engine
    objective: Any
    hooks: Hooks
    loader: UpdateLoader
    evaluators: Sequence[Evaluator]
    lr: LearningRate
    state: RunState
    total_steps: int
    epoch_samples: int | None
    data_fingerprint: str
    stop: StopRequests
    reporter: Reporter
    keeper: Keeper
    health: Health
    profiler: StepProfiler | None = None
    last_metrics: dict[str, Metric] = field(default_factory=dict)
    probe_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """The stored micro-batch of checkpoints; taken from the first update of a fresh run."""

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress(self.batch, self.config.data.seq_len, self.epoch_samples)

    @property
    def _tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.config.data.seq_len

    def train(self) -> ExitCode:
        """Train to the end of the run or to a request to stop. Collective; the same code on every rank."""
        if self.state.step < self.total_steps and not self.state.stopped_early:
            for loaded in self._updates():
                requests, totals = self._agree(loaded)
                if requests and self._serve(requests):
                    return ExitCode.STOPPED
                self._one(loaded, totals)
                if self.state.step >= self.total_steps or self.state.stopped_early:
                    break
        self._finish()
        return ExitCode.DONE

    def _updates(self) -> Any:
        """Updates of this rank from the cursor on, timed as data."""
        iterator = iter(self.loader)
        while True:
            with self.reporter.clock.phase("data"):
                loaded = next(iterator)
                device = self.engine.world.device
                loaded = LoadedUpdate(loaded.k, [micro.to(device) for micro in loaded.micro_batches])
            yield loaded

    def _agree(self, loaded: LoadedUpdate) -> tuple[int, list[int]]:
        """Requests of any rank as bits, and the global count of every term of a sum objective."""
        counts = local_counts(self.objective, loaded.micro_batches) if isinstance(self.objective, SumObjective) else []
        mine = self.stop.take()
        summed = self.engine.world.reduce_ints([*counts, *(int(bool(mine & bit)) for bit in _BITS)])
        requests = 0
        for bit, seen in zip(_BITS, summed[len(counts):], strict=True):
            requests |= bit if seen else 0
        return requests, summed[:len(counts)]

    def _serve(self, requests: int) -> bool:
        """Do what was asked for at this boundary. True where the run is to stop now."""
        if requests & RELOAD:
            self.state.lr_override = self.engine.world.on_main(self._reloaded_lr)
            _log.info("learning rate is now %g (control/reload_lr)", self.state.lr_override)
        if requests & EVAL:
            self._evaluate(self.evaluators)
        if requests & SAVE:
            self._save()
        if requests & STOP:
            self.reporter.reason = self.engine.world.broadcast(self.stop.reason) or "requested on another rank"
            _log.info("stopped at step %d (%s)", self.state.step, self.reporter.reason)
        return bool(requests & STOP)

    def _reloaded_lr(self) -> float:
        value = self.stop.control_values.pop("reload_lr", "")
        return float(value) if value else load_run_config(self.keeper.folder.config_file).config.optim.lr

    def _one(self, loaded: LoadedUpdate, totals: list[int]) -> None:
        before = self.progress
        if self.profiler is not None:
            self.profiler.before_step(self.state.step + 1)
        if not self.probe_inputs:
            self.probe_inputs = self._shared_probe(loaded.micro_batches[0])
        controls = self.hooks.controls(self.state.step)
        peak = self.config.optim.lr if self.state.lr_override is None else self.state.lr_override
        rate = peak * self.lr.factor(self.state.step)
        clock = self.reporter.clock
        if isinstance(self.objective, SumObjective):
            update = run_sum_update(self.engine, self.objective, loaded.micro_batches, totals, controls,
                                    step=self.state.step, lr=rate, clock=clock)
        else:
            update = run_full_update(self.engine, self.objective, loaded.micro_batches, controls, lr=rate, clock=clock)
        self._advance(loaded, update)
        self.reporter.add(update, rate, self.state.step, self._tokens_per_step)
        self._due(before, self.progress)

    def _shared_probe(self, first: Batch) -> dict[str, torch.Tensor]:
        """Rank 0's first micro-batch, on every rank: checkpoints prove themselves with it."""
        inputs = {k: v.detach().clone() for k, v in self.objective.probe_inputs(first).items()}
        if self.engine.world.size > 1:
            for name in sorted(inputs):
                dist.broadcast(inputs[name], src=0)
        return inputs

    def _advance(self, loaded: LoadedUpdate, update: Update) -> None:
        state = self.state
        state.k = loaded.k + 1
        if update.outcome.applied:
            state.step += 1
            if type(self.hooks).after_step is not Hooks.after_step:
                self.hooks.after_step(FamilyStepContext(self.engine, state.step))
        else:
            first = loaded.k * self.batch.global_batch_size
            _log.warning("batch %d skipped: gradient norm %s; samples %d to %d (see `pretrain data at RUN --batch %d`)",
                         loaded.k, update.outcome.grad_norm, first, first + self.batch.global_batch_size - 1, loaded.k)
        loss = float(update.metrics["loss"][0])
        for alarm in self.health.update(state.step, loaded.k, update.outcome.applied, loss, update.outcome.grad_norm):
            if self.engine.world.is_main:
                _log.warning("%s", alarm)

    def _due(self, before: Progress, after: Progress) -> None:
        last = self.state.step >= self.total_steps
        evaluators = [e for e in self.evaluators if e.every and e.every.due(before, after) is not None]
        improved = bool(evaluators) and not last and self._evaluate(evaluators)
        every = self.config.checkpoint.every
        scheduled = every is not None and every.due(before, after) is not None
        if (scheduled or (improved and self.config.checkpoint.keep_best)) and not last:
            self._save(best=improved)
        if self.config.monitor.log_every.due(before, after) is not None or last:
            self.reporter.log(self.state, after, len(self.health.bad_steps.skipped))

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> bool:
        """Run evaluators on all ranks without touching training. True where the run's metric improved."""
        results: dict[str, Metric] = {}
        was_training = self.engine.model.training
        with self.reporter.aside("eval"), rng.preserved(), torch.no_grad():
            self.engine.ds.eval()
            try:
                for evaluator in evaluators:
                    view = TrainingView(self.config, self.state.step, self.engine, self.hooks.controls(self.state.step))
                    results.update(evaluator.evaluate(view).metrics)
            finally:
                self.engine.ds.train(was_training)
        self.last_metrics.update(results)
        self.reporter.evaluation(self.state, self.progress, results)
        return self._judge(results)

    def _judge(self, results: dict[str, Metric]) -> bool:
        """Select, cut the rate on a plateau, stop early."""
        chosen = results.get(self.config.eval.metric)
        if chosen is None:
            return False
        improved = self.state.observe(chosen.value, higher_is_better=chosen.higher_is_better)
        if self.lr.observe(-chosen.value if chosen.higher_is_better else chosen.value):
            _log.info("plateau: learning-rate factor cut to %g", self.lr.plateau.factor)
        train = self.config.train
        perplexity = results.get("val/perplexity")
        if train.patience and self.state.evaluations_without_improvement >= train.patience:
            self.state.stopped_early = f"no improvement of {self.config.eval.metric} in {train.patience} evaluations"
        if train.target_perplexity and perplexity and perplexity.value <= train.target_perplexity:
            reached = f"{perplexity.value:.4g} reached {train.target_perplexity:g}"
            self.state.stopped_early = f"validation perplexity {reached}"
        return improved

    def _save(self, *, best: bool = False) -> None:
        if self.reporter.writer is not None:
            self.reporter.writer.sync()
        with self.reporter.aside("save"):
            snapshot = checkpoint.Snapshot(self.state.to_json(), self.lr.state_dict(), self.health.state_dict(),
                                           dict(self.hooks.state_dict()), self.data_fingerprint, self.probe_inputs,
                                           self.hooks.controls(self.state.step))
            self.keeper.save(self.engine, snapshot, best_metric=self.config.eval.metric if best else None)

    def _finish(self) -> None:
        """Final evaluation and checkpoint."""
        self.reporter.reason = self.state.stopped_early or "length reached"
        if self.profiler is not None:
            self.profiler.close()
        if not self.probe_inputs:  # a finished run was started again: nothing to do
            return
        best = self._evaluate(self.evaluators) if self.evaluators else False
        self._save(best=best and bool(self.config.checkpoint.keep_best))
