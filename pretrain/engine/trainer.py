"""The one training loop, for all families and objectives.

A step: agree on requests and token counts (one small host-side all-reduce), run the update, advance the cursor, then
fire what is due: evaluation, checkpoint, log. Every rank takes the same way through it. A loss spike may take it back
to a checkpoint (`rewind`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from pretrain.engine.evaluations import Evaluations
from pretrain.engine.evaluator import Evaluator
from pretrain.engine.keeping import Keeper
from pretrain.engine.nonfinite import Examiner
from pretrain.engine.reporting import Reporter
from pretrain.engine.rewind import rewind
from pretrain.engine.schedule import LearningRate
from pretrain.engine.state import RunState
from pretrain.engine.stopping import EVAL, RELOAD, SAVE, STOP, StopRequests
from pretrain.engine.update import Update, local_counts, run_full_update, run_sum_update, term_names
from pretrain.engine.views import FamilyStepContext
from pretrain.errors import Divergence, ExitCode, PretrainError
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
    open_loader: Callable[[int], UpdateLoader]
    """The loader from update k on."""
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
    saved: RunState | None = None
    """State of the last checkpoint written or loaded."""
    probe_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """The stored micro-batch of checkpoints; taken from the first update of a fresh run."""
    _share: tuple[int, float] | None = None
    """(step, this rank's share of the loss) of an update whose whole loss is not known yet."""
    _due_at_end: bool = False
    """Whether the last save is one that `checkpoint.every` asks for as well."""

    def __post_init__(self) -> None:
        self._examiner = Examiner(self.keeper.folder.nonfinite_dir)
        self.evaluations = Evaluations(self.config, self.engine, self.hooks, self.lr, self.reporter, self.stop)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self._progress_of(self.state)

    def _progress_of(self, state: RunState) -> Progress:
        return state.progress(self.batch, self.config.data.tokens_per_sample, self.epoch_samples)

    @property
    def _tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.config.data.tokens_per_sample

    @property
    def _complete(self) -> bool:
        return self.state.step >= self.total_steps or self.state.stopped_early is not None

    def train(self) -> ExitCode:
        """Train to the end of the run or to a request to stop. Collective; the same code on every rank.

        A loader that fails on one rank ends the run on all of them with its error, after a checkpoint: once the data
        are repaired the run goes on at the very batch.
        """
        self.reporter.reason = self.state.stopped_early or "length reached"
        owed = [e for e in self.evaluators if e.name in self.state.owed]
        if self._complete and not owed:
            _log.info("%s is complete: step %d of %d (%s); nothing to do", self.keeper.folder.root, self.state.step,
                      self.total_steps, self.reporter.reason)
            self._discard_requests()
            return ExitCode.DONE
        if owed and self.state.step < self.total_steps and self._evaluate(owed) and self.config.checkpoint.keep_best:
            self._save(best=True)
        if self.state.k == 0:
            self.reporter.start(self.hooks.measured())
        if self.config.eval.at_start and self.state.k == 0 and self.evaluators:
            # No checkpoint could hold these weights yet, so they are not compared with later ones.
            self.evaluations.run(self.evaluators, self.state, self.progress, whole=True, select=False)
        while not self._complete:
            if self.step():
                return ExitCode.STOPPED
        return self._finish()

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Take over all of a loaded checkpoint that is not in the engine. The loader is the caller's."""
        self.state = RunState.from_json(snapshot.state)
        self.saved = RunState.from_json(snapshot.state)
        self.lr.load_state_dict(snapshot.schedule)
        self.health.load_state_dict(snapshot.health)
        self.hooks.load_state_dict(snapshot.hooks)
        self.probe_inputs = snapshot.probe_inputs
        self.evaluations.done.clear()
        self._share = None

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
        """Requests of any rank as bits, and the global counts of a sum objective's terms.

        A checkpoint that all ranks have written in the background meanwhile is published.
        """
        mine = self.stop.take() | (_NO_DATA if isinstance(loaded, PretrainError) else 0)
        share = self._share[1] if self._share is not None else 0.0
        *summed, ended, loss = self.engine.world.add_up(
            [*counts, *(int(bool(mine & bit)) for bit in _BITS), int(self.keeper.ended), share])
        self._judge_late(loss)
        if ended == self.engine.world.size:
            self._settle()
        requests = 0
        for bit, seen in zip(_BITS, summed[len(counts):], strict=True):
            requests |= bit if seen else 0
        return requests, [int(total) for total in summed[:len(counts)]]

    def _judge_late(self, summed: float) -> None:
        """Judge the last update by its loss, the mean over ranks of their shares."""
        if self._share is not None:
            step, self._share = self._share[0], None
            alarm = self.health.late_loss(step, summed / self.engine.world.size)
            if alarm is not None and self.engine.world.is_main:
                _log.warning("%s", alarm)

    def _serve(self, requests: int, loaded: LoadedUpdate | PretrainError) -> bool:
        """Do what was asked for at this boundary. True where the run is to stop now."""
        if requests & RELOAD:
            self._reload_lr()
        improved = bool(requests & EVAL) and self._evaluate(self.evaluators)
        keep = improved and bool(self.config.checkpoint.keep_best)
        ends = bool(requests & (STOP | _NO_DATA))
        if (keep or requests & (SAVE | _NO_DATA)) and not self._save(best=keep, wait=ends):
            _log.info("step %d: nothing new since the last checkpoint", self.state.step)
        if requests & _NO_DATA:
            self.engine.world.all_or_none(lambda: _raise(loaded))
        if requests & STOP:
            self._told_stop()
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
        clock, policy = self.reporter.clock, self.config.train.on_spike
        self.engine.watch_gradients = self._looked_at(before)
        judge = partial(self.health.spike, self.state.step) if policy != "warn" else None
        drawn = rng.capture()
        if self._sums:
            update = run_sum_update(self.engine, self.objective, loaded.micro_batches, totals, controls,
                                    step=self.state.step, lr=rate, clock=clock, judge=judge)
        else:
            update = run_full_update(self.engine, self.objective, loaded.micro_batches, controls, step=self.state.step,
                                     total_steps=self.total_steps, lr=rate, clock=clock, judge=judge)
        if not update.outcome.applied and update.spike is None:
            self._examiner.examine(self.engine, self.objective, loaded, update, step=self.state.step, before=drawn,
                                   total_steps=self.total_steps, lr=rate, controls=controls)
        if self._accept(loaded, update):
            self.reporter.add(update, rate, self.state.step, self._tokens_per_step)
            self._due(before, self.progress)

    def _looked_at(self, before: Progress) -> bool:
        """Whether an evaluation follows the next update, if that is applied."""
        after = self._progress_of(replace(self.state, step=self.state.step + 1))
        return after.steps >= self.total_steps or bool(self._evaluators_due(before, after))

    def _evaluators_due(self, before: Progress, after: Progress) -> list[Evaluator]:
        return [e for e in self.evaluators if e.every and e.every.due(before, after) is not None]

    def _accept(self, loaded: LoadedUpdate, update: Update) -> bool:
        """Move the cursor past an update; or, where it is a reason to, back to a checkpoint: then False."""
        rewinds = self.config.train.on_spike == "rewind"
        loss = float(update.metrics["loss"][0]) if update.loss is None else update.loss
        if rewinds and update.spike is not None:
            if self._rewind(loaded.k, loss, str(update.spike)):
                return False
            if self.engine.world.is_main:
                what = "the update is applied, as this objective knows its loss too late" if update.outcome.applied \
                    else "the update is skipped"
                _log.warning("batch %d: there is no checkpoint to go back to yet; %s", loaded.k, what)
        try:
            self._advance(loaded, update, loss)
        except Divergence as error:
            self._settle()
            if not rewinds or not self._rewind(loaded.k, loss, str(error)):
                raise
            return False
        return True

    def _rewind(self, k: int, loss: float, why: str) -> bool:
        """Go back because of batch `k`, and save where that leads. False where there is nothing to go back to."""
        self._settle()
        gone = rewind(self, k, loss, why)
        if gone:
            self._save(wait=True)  # a run that is killed now does not go through those batches again
        return gone

    def _shared_probe(self, first: Batch) -> dict[str, torch.Tensor]:
        """Rank 0's first micro-batch, on every rank: checkpoints prove themselves with it."""
        inputs = {k: v.detach().clone() for k, v in self.objective.probe_inputs(first).items()}
        if self.engine.world.size > 1:
            for name in sorted(inputs):
                dist.broadcast(inputs[name], src=0)
        return inputs

    def _advance(self, loaded: LoadedUpdate, update: Update, loss: float) -> None:
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
        if update.loss is None and update.outcome.applied:
            self._share = state.step, loss
        for alarm in self.health.update(state.step, loaded.k, update.outcome.applied, loss, update.outcome.grad_norm,
                                        spike=update.spike is not None, whole=update.loss is not None):
            if self.engine.world.is_main:
                _log.warning("%s", alarm)

    def _due(self, before: Progress, after: Progress) -> None:
        last = self.state.step >= self.total_steps
        evaluators = self._evaluators_due(before, after)
        improved = bool(evaluators) and not last and self._evaluate(evaluators)
        every = self.config.checkpoint.every
        scheduled = every is not None and every.due(before, after) is not None
        if self.config.monitor.log_every.due(before, after) is not None or last:
            # Before the checkpoint: a kill after it would leave no row of this step, which nobody goes through again.
            self.reporter.log(self.state, after, len(self.health.bad_steps.skipped), self.keeper.notice)
        if (scheduled or (improved and self.config.checkpoint.keep_best)) and not last:
            self._save(best=improved, scheduled=scheduled)
        self._due_at_end = scheduled and last

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> bool:
        whole = len(evaluators) == len(self.evaluators)
        return self.evaluations.run(evaluators, self.state, self.progress, whole=whole)

    def _save(self, *, best: bool = False, wait: bool = False, scheduled: bool = False) -> bool:
        """Write a checkpoint, in the background where that is configured and not to be waited for. Collective.

        Where one is still being written, that one is published first. False where there is nothing new to keep.
        """
        self._settle()
        if not self.probe_inputs or (self.state == self.saved and not best):
            return False
        if self._share is not None:
            self._judge_late(*self.engine.world.add_up([self._share[1]]))
        if self.reporter.writer is not None:
            self.reporter.writer.sync()
        with self.reporter.aside("save"):
            snapshot = self.snapshot()
            in_background = self.config.checkpoint.async_save and not wait
            self.keeper.begin(self.engine, snapshot, best_metric=self.config.eval.metric if best else None,
                              to_host=in_background, scheduled=scheduled)
            self.state.saves, self.state.counted = snapshot.state["saves"], snapshot.state["counted"]
        if not in_background:
            self._settle()
        self.saved = copy.deepcopy(self.state)
        return True

    def snapshot(self) -> checkpoint.Snapshot:
        """Where the run stands, but for what the engine holds."""
        return checkpoint.Snapshot(self.state.to_json(), self.lr.state_dict(), self.health.state_dict(),
                                   dict(self.hooks.state_dict()), self.data_fingerprint, self.probe_inputs,
                                   self.hooks.controls(self.state.step))

    def _settle(self) -> None:
        """Wait for a checkpoint that is being written, on all ranks, and publish it. Collective."""
        if self.keeper.pending:
            with self.reporter.aside("save"):
                self.keeper.publish(self.engine)

    def _finish(self) -> ExitCode:
        """Final evaluation and checkpoint. Where a request to stop cuts the evaluation short, only that is left."""
        self.reporter.reason = self.state.stopped_early or "length reached"
        self.state.owed = []
        if self.profiler is not None:
            self.profiler.close()
        due = [e for e in self.evaluators if self.evaluations.done.get(e.name) != self.state.step]
        best = self._evaluate(due) if due else False
        self._save(best=best and bool(self.config.checkpoint.keep_best), wait=True, scheduled=self._due_at_end)
        if self.state.owed:
            self._told_stop()
            return ExitCode.STOPPED
        self._discard_requests()
        return ExitCode.DONE

    def _told_stop(self) -> None:
        self.reporter.reason = self.engine.world.broadcast(self.stop.reason) or "requested on another rank"
        _log.info("stopped at step %d (%s)", self.state.step, self.reporter.reason)

    def _discard_requests(self) -> None:
        for name in self.stop.discard() if self.engine.world.is_main else ():
            _log.info("control/%s: came after the end of the run and is removed", name)


def _raise(loaded: LoadedUpdate | PretrainError) -> None:
    if isinstance(loaded, PretrainError):
        raise loaded
