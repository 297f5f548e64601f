"""The one training loop, for all families and objectives.

A step: agree on requests and token counts (one small host-side all-reduce), run the update, advance the cursor, then
fire what is due: evaluation, checkpoint, log. Every rank takes the same way through it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config.interval import Progress
from pretrain.config.load import load_run_config
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.config.suggest import nearest
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
from pretrain.engine.update import Update, local_counts, run_full_update, run_sum_update, term_names
from pretrain.engine.views import FamilyStepContext, TrainingView
from pretrain.errors import ConfigError, ExitCode, PretrainError
from pretrain.models.base import Hooks
from pretrain.monitor.health import Health
from pretrain.monitor.profiler import StepProfiler
from pretrain.objectives.base import SumObjective
from pretrain.runfolder.control import learning_rate

_NO_DATA = 16
"""Beside the bits of requests: the loader of a rank has failed."""
_BITS = (SAVE, STOP, EVAL, RELOAD, _NO_DATA)
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
    evaluated: dict[str, int] = field(default_factory=dict)
    """Step of the last evaluation by evaluator."""
    saved: RunState | None = None
    """State of the last checkpoint written or loaded."""
    probe_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """The stored micro-batch of checkpoints; taken from the first update of a fresh run."""

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress(self.batch, self.config.data.seq_len, self.epoch_samples)

    @property
    def _tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.config.data.seq_len

    @property
    def _complete(self) -> bool:
        return self.state.step >= self.total_steps or self.state.stopped_early is not None

    def train(self) -> ExitCode:
        """Train to the end of the run or to a request to stop. Collective; the same code on every rank.

        A loader that fails on one rank ends the run on all of them with its error, after a checkpoint: once the data
        are repaired the run goes on at the very batch.
        """
        self.reporter.reason = self.state.stopped_early or "length reached"
        if self._complete:
            _log.info("%s is complete: step %d of %d (%s); nothing to do", self.keeper.folder.root, self.state.step,
                      self.total_steps, self.reporter.reason)
            return ExitCode.DONE
        while not self._complete:
            if self.step():
                return ExitCode.STOPPED
        self._finish()
        return ExitCode.DONE

    def step(self) -> bool:
        """Run the next update and whatever is due after it. True where a request to stop was served instead."""
        with self.reporter.clock.phase("data"):
            loaded, counts = self._read()
        requests, totals = self._agree(loaded, counts)
        if requests and self._serve(requests, loaded):
            return True
        if isinstance(loaded, LoadedUpdate) and not self._complete:  # an evaluation on request may have ended the run
            self._one(loaded, totals)
        return False

    def _read(self) -> tuple[LoadedUpdate | PretrainError, list[int]]:
        """This rank's next update on its device, and its counts of a sum objective's terms; or what data ended with."""
        try:
            loaded = next(self.loader)
        except PretrainError as error:
            return error, [0] * (len(term_names(self.objective)) if self._sums else 0)
        # Counted before the copy to the device: reading them there would wait for everything queued on it.
        counts = local_counts(self.objective, loaded.micro_batches) if self._sums else []
        device = self.engine.world.device
        return LoadedUpdate(loaded.k, [micro.to(device) for micro in loaded.micro_batches]), counts

    @property
    def _sums(self) -> bool:
        return isinstance(self.objective, SumObjective)

    def _agree(self, loaded: LoadedUpdate | PretrainError, counts: list[int]) -> tuple[int, list[int]]:
        """Requests of any rank as bits, and the global counts of a sum objective's terms."""
        mine = self.stop.take() | (_NO_DATA if isinstance(loaded, PretrainError) else 0)
        summed = self.engine.world.reduce_ints([*counts, *(int(bool(mine & bit)) for bit in _BITS)])
        requests = 0
        for bit, seen in zip(_BITS, summed[len(counts):], strict=True):
            requests |= bit if seen else 0
        return requests, summed[:len(counts)]

    def _serve(self, requests: int, loaded: LoadedUpdate | PretrainError) -> bool:
        """Do what was asked for at this boundary. True where the run is to stop now."""
        if requests & RELOAD:
            self._reload_lr()
        improved = bool(requests & EVAL) and self._evaluate(self.evaluators)
        keep = improved and bool(self.config.checkpoint.keep_best)
        if (keep or requests & (SAVE | _NO_DATA)) and not self._save(best=keep):
            _log.info("step %d: nothing new since the last checkpoint", self.state.step)
        if requests & _NO_DATA:
            self.engine.world.all_or_none(lambda: _raise(loaded))
        if requests & STOP:
            self.reporter.reason = self.engine.world.broadcast(self.stop.reason) or "requested on another rank"
            _log.info("stopped at step %d (%s)", self.state.step, self.reporter.reason)
        return bool(requests & STOP)

    def _reload_lr(self) -> None:
        """Take the rate of the request, else of config.yaml. One that cannot be used is said and passed over."""
        wanted = self.engine.world.on_main(self._requested_lr)
        if isinstance(wanted, str):
            _log.warning("control/reload_lr: %s; the learning rate stays", wanted)
        else:
            self.state.lr_override = wanted
            _log.info("learning rate is now %g (control/reload_lr)", wanted)

    def _requested_lr(self) -> float | str:
        value = self.stop.control_values.pop("reload_lr", "")
        try:
            return learning_rate(value) if value else load_run_config(self.keeper.folder.config_file).config.optim.lr
        except PretrainError as error:
            return str(error)

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
        if self._sums:
            judge = partial(self.health.spike, self.state.step) if self.config.train.on_spike == "skip" else None
            update = run_sum_update(self.engine, self.objective, loaded.micro_batches, totals, controls,
                                    step=self.state.step, lr=rate, clock=clock, judge=judge)
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
            why = update.spike or f"gradient norm {update.outcome.grad_norm}"
            _log.warning("batch %d skipped: %s; samples %d to %d (see `pretrain data at RUN --batch %d`)",
                         loaded.k, why, first, first + self.batch.global_batch_size - 1, loaded.k)
        loss = float(update.metrics["loss"][0]) if update.loss is None else update.loss
        for alarm in self.health.update(state.step, loaded.k, update.outcome.applied, loss, update.outcome.grad_norm,
                                        spike=update.spike is not None):
            if self.engine.world.is_main:
                _log.warning("%s", alarm)

    def _due(self, before: Progress, after: Progress) -> None:
        last = self.state.step >= self.total_steps
        evaluators = [e for e in self.evaluators if e.every and e.every.due(before, after) is not None]
        improved = bool(evaluators) and not last and self._evaluate(evaluators)
        every = self.config.checkpoint.every
        scheduled = every is not None and every.due(before, after) is not None
        if self.config.monitor.log_every.due(before, after) is not None or last:
            # Before the checkpoint: a kill after it would leave no row of this step, which nobody goes through again.
            self.reporter.log(self.state, after, len(self.health.bad_steps.skipped), self.keeper.notice)
        if (scheduled or (improved and self.config.checkpoint.keep_best)) and not last:
            self._save(best=improved)

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> bool:
        """Run evaluators on all ranks without touching training. True where the run's metric improved."""
        results: dict[str, Metric] = {}
        was_training = self.engine.model.training
        self.evaluated |= {evaluator.name: self.state.step for evaluator in evaluators}
        with self.reporter.aside("eval"), rng.preserved(), torch.no_grad():
            self.engine.ds.eval()
            try:
                for evaluator in evaluators:
                    view = TrainingView(self.config, self.state.step, self.engine, self.hooks.controls(self.state.step))
                    results.update(evaluator.evaluate(view).metrics)
            finally:
                self.engine.ds.train(was_training)
        self.reporter.evaluation(self.state, self.progress, results)
        metric = self.config.eval.metric
        if metric not in results and len(evaluators) == len(self.evaluators):
            error = ConfigError("eval.metric", f"no evaluation gives {metric}{nearest(metric, results)}; there are "
                                f"{', '.join(sorted(results))}")
            error.agreed = True  # results are equal on all ranks
            raise error
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

    def _save(self, *, best: bool = False) -> bool:
        """Write a checkpoint. False where there is nothing new to keep."""
        if not self.probe_inputs or (self.state == self.saved and not best):
            return False
        if self.reporter.writer is not None:
            self.reporter.writer.sync()
        with self.reporter.aside("save"):
            snapshot = checkpoint.Snapshot(self.state.to_json(), self.lr.state_dict(), self.health.state_dict(),
                                           dict(self.hooks.state_dict()), self.data_fingerprint, self.probe_inputs,
                                           self.hooks.controls(self.state.step))
            self.keeper.save(self.engine, snapshot, best_metric=self.config.eval.metric if best else None)
            self.state.saves = snapshot.state["saves"]
        self.saved = copy.deepcopy(self.state)
        return True

    def _finish(self) -> None:
        """Final evaluation and checkpoint."""
        self.reporter.reason = self.state.stopped_early or "length reached"
        if self.profiler is not None:
            self.profiler.close()
        due = [e for e in self.evaluators if self.evaluated.get(e.name) != self.state.step]
        best = self._evaluate(due) if due else False
        self._save(best=best and bool(self.config.checkpoint.keep_best))


def _raise(loaded: LoadedUpdate | PretrainError) -> None:
    if isinstance(loaded, PretrainError):
        raise loaded
