"""Runs one update of either objective protocol through the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.data.batch import Batch
from pretrain.engine import rng as rng_module
from pretrain.engine.build import Engine, StepOutcome
from pretrain.monitor.clock import TimeShares
from pretrain.monitor.health import Alarm
from pretrain.objectives.base import SumObjective, UpdateObjective

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(sum, count) by metric, of this rank."""


@dataclass(frozen=True, slots=True)
class Update:
    """Outcome of one update."""

    outcome: StepOutcome
    metrics: Sums
    """To be added up over updates and ranks, then divided; `loss` is among them."""
    loss: float | None = None
    """Of the whole update, equal on every rank, where that is known: `metrics` of a sum objective hold shares."""
    spike: Alarm | None = None
    """What was judged a spike. A sum objective's update was then dropped; the other kind's was applied."""


def term_names(objective: SumObjective) -> list[str]:
    """Terms in a fixed order, the same on every rank."""
    return sorted(objective.terms)


def local_counts(objective: SumObjective, micro_batches: Sequence[Batch]) -> list[int]:
    """This rank's count of every term over the whole update, in the order of `term_names`."""
    totals = dict.fromkeys(term_names(objective), 0)
    for batch in micro_batches:
        counts = objective.counts(batch)
        if set(counts) != set(totals):
            raise RuntimeError(f"counts() gave terms {sorted(counts)}, the objective has {sorted(totals)}")
        for name, count in counts.items():
            totals[name] += count
    return [totals[name] for name in term_names(objective)]


def run_sum_update(engine: Engine, objective: SumObjective, micro_batches: Sequence[Batch], totals: Sequence[int],
                   controls: Mapping[str, float], *, step: int, lr: float, clock: TimeShares,
                   judge: Callable[[float], Alarm | None] | None = None) -> Update:
    """One update of a sum objective: loss = sum over terms of weight * sum / total.

    `totals` are the counts of the whole update over all micro-batches and ranks. DeepSpeed averages gradients over
    ranks, so each micro-batch contributes weight * sum * world / total; how the global batch is split then changes
    nothing but rounding. A term whose total is 0 gives 0.

    `judge` gets the loss of the whole update before its last backward; where it finds a spike, the update is dropped
    on every rank. It must answer alike on all of them.
    """
    names = term_names(objective)
    weights = {n: w(step) if callable(w := objective.terms[n]) else float(w) for n in names}
    scale = {n: weights[n] * engine.world.size / t if t else 0.0 for n, t in zip(names, totals, strict=True)}
    device = engine.world.device
    metrics: Sums = {}
    loss_value = torch.zeros((), dtype=torch.float64, device=device)
    whole: float | None = None
    spike: Alarm | None = None
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with clock.phase("forward"):
            result = objective(engine.forward, batch, controls)
            loss = sum((result.sums[n] * scale[n] for n in names), start=torch.zeros((), device=device))
            loss_value += loss.detach().double()
            if judge is not None and last:
                whole = _over_ranks(engine, loss_value)
                spike = judge(whole)
        with clock.phase("backward"):
            # The way out that every stage has: what is not finite reaches neither weights nor moments.
            engine.backward(loss * math.nan if spike else loss, last=last)
        _accumulate(metrics, result.metrics)
    with clock.phase("step"):
        outcome = engine.step(lr)
    # Each rank holds world * its share of the loss; with a count of 1 a rank, the mean over ranks is the loss itself.
    metrics["loss"] = (loss_value, torch.ones((), dtype=torch.float64, device=device))
    return Update(outcome, metrics, whole, spike)


def _over_ranks(engine: Engine, value: torch.Tensor) -> float:
    """Mean of a scalar over ranks, through the host."""
    mean = value.cpu() / engine.world.size
    if engine.world.size > 1:
        dist.all_reduce(mean, group=engine.world.control)
    return float(mean)


def _accumulate(into: Sums, more: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, (total, count) in more.items():
        total, count = total.detach().double(), count.detach().double()
        if name in into:
            total, count = total + into[name][0], count + into[name][1]
        into[name] = (total, count)


class EngineHandle:
    """The engine as an update objective sees it (`UpdateHandle`)."""

    def __init__(self, engine: Engine, controls: Mapping[str, float], clock: TimeShares, *, step: int,
                 total_steps: int) -> None:
        self.step = step
        self.total_steps = total_steps
        self._engine = engine
        self._controls = controls
        self._clock = clock
        self.rank = engine.world.rank
        self.world = engine.world.size
        self.backwards = 0
        self.closed = False

    def forward(self, batch: Batch, *, grad: bool, rng: Any | None = None) -> Any:
        """The model's output for the tensors of `batch`; `rng` replays an earlier forward's random state."""
        current = None
        if rng is not None:
            current = rng_module.capture()
            rng_module.restore(rng)
        try:
            with self._clock.phase("forward"), torch.set_grad_enabled(grad):
                return self._engine.forward(**batch.tensors, controls=self._controls)
        finally:
            if current is not None:
                rng_module.restore(current)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """Random state to replay the next forward."""
        return rng_module.capture()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate; exactly one call has `last`."""
        if self.closed:
            raise RuntimeError("backward after the one that was marked last")
        with self._clock.phase("backward"):
            self._engine.backward(loss, last=last)
        self.backwards += 1
        self.closed = last

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b, ...] of every rank -> [world * b, ...] in rank order, without gradient. Equal b on all ranks."""
        tensor = tensor.detach().contiguous()
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place, without gradient."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, flag: bool) -> bool:
        """True where the flag is true on every rank."""
        return self._engine.world.agree(flag)


def run_full_update(engine: Engine, objective: UpdateObjective, micro_batches: Sequence[Batch],
                    controls: Mapping[str, float], *, step: int, total_steps: int, lr: float, clock: TimeShares,
                    judge: Callable[[float], Alarm | None] | None = None) -> Update:
    """One update, after `step` applied ones of `total_steps`, of an objective that drives forward and backward itself.

    `judge` gets its loss once it is over: only going back to a checkpoint can then undo it.
    """
    handle = EngineHandle(engine, controls, clock, step=step, total_steps=total_steps)
    result = objective.run(handle, micro_batches, controls)
    if result.finite and not handle.closed:
        raise RuntimeError("the update objective ended without a backward marked last")
    if not result.finite and handle.backwards:
        raise RuntimeError("the update objective calls an update not finite after a backward; it must agree before")
    if result.finite:
        with clock.phase("step"):
            outcome = engine.step(lr)
    else:
        outcome = StepOutcome(applied=False, grad_norm=math.nan)
    device = engine.world.device
    one = torch.ones((), dtype=torch.float64, device=device)
    figures = {**result.metrics, "loss": result.loss}
    metrics = {k: (torch.tensor(v, dtype=torch.float64, device=device), one) for k, v in figures.items()}
    spike = judge(result.loss) if judge is not None and outcome.applied else None
    return Update(outcome, metrics, result.loss, spike)


class _Rehearsal(EngineHandle):
    """The engine without gradients: forwards run, backwards do nothing."""

    def forward(self, batch: Batch, *, grad: bool, rng: Any | None = None) -> Any:
        """As in training, without a graph."""
        return super().forward(batch, grad=False, rng=rng)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Nothing."""


def without_gradient(engine: Engine, objective: SumObjective | UpdateObjective, micro_batches: Sequence[Batch],
                     controls: Mapping[str, float], *, step: int, total_steps: int) -> dict[str, float]:
    """The forwards of an update once more, which leave nothing behind. Collective.

    Returns the sums of each term and micro-batch of this rank (`NAME/0`, `NAME/1`, ...), or what an update objective
    gives for its metrics.
    """
    if isinstance(objective, UpdateObjective):
        handle = _Rehearsal(engine, controls, TimeShares(), step=step, total_steps=total_steps)
        result = objective.run(handle, micro_batches, controls)
        return {"loss": result.loss, **result.metrics}
    with torch.no_grad():
        return {f"{name}/{number}": float(total) for number, batch in enumerate(micro_batches)
                for name, total in objective(engine.forward, batch, controls).sums.items()}
