"""Requests to stop that come in the middle of an evaluation, to one rank only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain.config.interval import Interval
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.engine.stopping import StopSignals
from pretrain.monitor.rows import read_metrics
from tests.engine.feature_cases import Scripted
from tests.engine.rewind_cases import digest
from tests.engine.running import finish, start

FORWARDS = 40
SECTIONS: dict[str, Any] = {"model": {"dropout": 0.2}, "checkpoint": {"every": "5 steps", "keep_last": 9},
                            "eval": {"every": "4 steps"}, "train": {"length": "10 steps"}}


class Long:
    """Forty forwards an evaluation; at the thirteenth of one of them a signal reaches this rank."""

    name = "long"
    every = Interval(4, "steps")

    def __init__(self, signals: StopSignals, at_step: int | None) -> None:
        self.signals, self.at_step = signals, at_step
        self.forwards = 0

    def evaluate(self, view: Any) -> EvalResult:
        total = 0.0
        for number in range(FORWARDS):
            if number == 12 and view.step == self.at_step:
                self.signals.reason, self.at_step = "SIGTERM", None
            tokens = torch.full((2, 16), (number + view.step) % 64)
            total += float(view.forward(input_ids=tokens, labels=tokens).nll_sum)
            self.forwards += 1
        return EvalResult({"val/loss": Metric(total, FORWARDS, False)})


def stopped_evaluation(world: World, folder: Path) -> dict[str, Any]:
    """Undisturbed, and stopped in the evaluation of step 4 and in the final one; then started again until done."""
    found: dict[str, Any] = {}
    for name, at in (("never", ()), ("middle", (4,)), ("final", (10,)), ("both", (4, 10))):
        waiting, codes, forwards, steps = list(at), [], [], []
        while True:
            signals = StopSignals(is_main=world.is_main)
            hit = waiting.pop(0) if waiting else None
            evaluator = Long(signals, hit if world.rank == world.size - 1 else None)
            trainer = start(world, folder, name, [evaluator], **SECTIONS)
            trainer.stop._signals = signals
            steps.append(trainer.state.step)
            codes.append(int(trainer.train()))
            forwards.append(evaluator.forwards)
            last = {"digest": digest(trainer), "best": trainer.state.best_steps, "owed": trainer.state.owed,
                    "reason": trainer.reporter.reason}
            pointer = trainer.keeper.folder.read_pointer("best-val/loss")
            finish(trainer)
            if codes[-1] == 0:
                break
        rows = read_metrics(trainer.keeper.folder)
        found[name] = last | {"codes": codes, "forwards": forwards, "steps": steps,
                              "pointer": pointer.step if pointer else None,
                              "val": {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}}
    return found


def judged_otherwise(world: World, folder: Path) -> dict[str, Any]:
    """A run that ended early goes on once it may; figures of other samples make it forget its best; rates change."""
    found: dict[str, Any] = {}
    base: dict[str, Any] = {"eval": {"every": "2 steps"}, "checkpoint": {"every": None, "keep_best": 0}}
    fewer = {"every": "2 steps", "max_batches": 3}
    for name, values, changed in (
            ("ends", [3.0, 2.0, 2.5, 2.5], {"train": {"length": "20 steps", "patience": 2}}),
            ("same", [], {"train": {"length": "20 steps", "patience": 2}}),
            ("patient", [2.5] * 9, {"train": {"length": "12 steps"}}),
            ("other samples", [4.0] * 9, {"train": {"length": "14 steps"}, "eval": fewer}),
            ("rate", [5.0] * 9, {"train": {"length": "16 steps"}, "optim": {"lr": 0.02}, "eval": fewer})):
        trainer = start(world, folder, "run", [Scripted(values)], **{**base, **changed})
        begun = trainer.state.lr_override
        if name != "rate":
            trainer.state.lr_override = 0.005
        trainer.train()
        found[name] = {"step": trainer.state.step, "best": trainer.state.best, "best_steps": trainer.state.best_steps,
                       "early": trainer.state.stopped_early, "override": begun}
        finish(trainer)
    return found


CASES = {"stopped_evaluation": stopped_evaluation, "judged_otherwise": judged_otherwise}
