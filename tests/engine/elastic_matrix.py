"""Launches of the slow suite: every stage to every other over worlds 1, 2, 4, 1, and a resume that is killed.

The folder of a launch says which it is. Leg 0 begins; leg n goes on from what leg n-1, beside it, has saved.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.distributed import World
from pretrain.engine.shards import Shards
from tests.engine.elastic_cases import TOY, begin, go_on, sections
from tests.engine.running import finish, start
from tests.engine.test_shard_reader import peak_of_private_bytes, private_bytes
from tests.engine.world import main

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (2, 3)}
LEGS = (1, 2, 4, 1)
"""World size of each leg."""
LEG_STEPS = 20
LENGTH = LEG_STEPS * len(LEGS)
DOOMED = "doomed"
BIG: dict[str, Any] = {"family": "toy", "width": 1023, "vocab_size": 4096}
"""9.4 million trained parameters: 113 MB of masters and moments."""


def pairs(precision: str) -> list[tuple[int, int]]:
    """(stage saved, stage resumed), equal ones included."""
    return [(saved, stage) for saved in STAGES[precision] for stage in STAGES[precision]]


def carrier(precision: str, stage: int) -> str:
    """Name of the run whose checkpoint at `stage` the next leg takes: one that came from another stage."""
    stages = STAGES[precision]
    return f"{precision}-{stages[stages.index(stage) - 1]}-{stage}"


def copied(world: World, folder: Path, leg: int, run: str, name: str) -> None:
    """A run that leg `leg` saved, under another name in this launch."""
    source = folder.parents[1] / f"leg-{leg}" / ("first_leg" if leg == 0 else "next_leg") / "runs" / run
    world.on_main(lambda: shutil.copytree(source, folder / "runs" / name) and None)


def first_leg(world: World, folder: Path) -> dict[str, Any]:
    """Undisturbed runs, and the first steps at every stage under the names of carriers."""
    found = {}
    for precision, stages in STAGES.items():
        name = f"undisturbed-{precision}"
        found[name] = {"losses": begin(world, folder, name, TOY, precision, stages[0], LENGTH, stop=LENGTH)}
        for stage in stages:
            begin(world, folder, carrier(precision, stage), TOY, precision, stage, LENGTH, stop=LEG_STEPS)
    begin(world, folder, DOOMED, TOY, "fp32", 2, LENGTH)
    return found


def next_leg(world: World, folder: Path) -> dict[str, Any]:
    """Every stage to every stage from what the last leg's carriers saved."""
    leg = int(folder.parent.name.rpartition("-")[2])
    found = {}
    for precision in STAGES:
        for saved, stage in pairs(precision):
            name = f"{precision}-{saved}-{stage}"
            copied(world, folder, leg - 1, carrier(precision, saved), name)
            found[name] = go_on(world, folder, name, TOY, precision, stage, LENGTH, LEG_STEPS)
    return found


def other_split(world: World, folder: Path) -> dict[str, Any]:
    """The last leg in bf16 with another micro-batch than the first ones had."""
    found = {}
    for stage in STAGES["bf16"]:
        name = f"bf16-{stage}"
        copied(world, folder, 2, carrier("bf16", stage), name)
        found[name] = go_on(world, folder, name, TOY, "bf16", stage, LENGTH, LEG_STEPS, micro_batch=4)
    return found


def other_precision(world: World, folder: Path) -> dict[str, Any]:
    """A bf16 run goes on in fp32, and the other way round."""
    found = {}
    for saved, precision in (("bf16", "fp32"), ("fp32", "bf16")):
        copied(world, folder, 2, carrier(saved, 2), saved)
        found[saved] = go_on(world, folder, saved, TOY, precision, 3, LENGTH, LEG_STEPS)
    return found


def big(world: World, folder: Path) -> None:
    """Checkpoints to measure the memory of a load with."""
    for stage in (2, 3):
        begin(world, folder, f"big-{stage}", BIG, "fp32", stage, LENGTH, stop=2)


def memory(world: World, folder: Path) -> dict[str, int]:
    """Private bytes at most in use while 2 ranks' state is taken over by 1, beyond those in use afterwards."""
    from pretrain.engine import elastic
    restore, over = elastic.restore, {}

    def measured(*arguments: Any) -> None:
        with peak_of_private_bytes() as peak:
            restore(*arguments)
        over[name] = peak[0] - private_bytes()

    elastic.restore = measured
    try:
        for saved in (2, 3):
            for stage in (0, 2, 3):
                name = f"{saved}-{stage}"
                source = folder.parents[1] / "leg-1" / "big" / "runs" / f"big-{saved}"
                shutil.copytree(source, folder / "runs" / name)
                finish(start(world, folder, name, **sections(BIG, "fp32", stage, LENGTH)))
    finally:
        elastic.restore = restore
    return over


def killed(world: World, folder: Path) -> None:
    """Every rank is killed in the middle of taking a checkpoint over."""
    copy, calls = Shards.copy, []

    def killing(self: Shards, name: str, kind: Any, begin: int, out: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        copy(self, name, kind, begin, out)

    Shards.copy = killing  # type: ignore[method-assign]
    start(world, folder.parents[1] / "leg-0" / "first_leg", DOOMED, **sections(TOY, "fp32", 3, LENGTH))


def after_kill(world: World, folder: Path) -> dict[str, Any]:
    """The same command once more."""
    return go_on(world, folder.parents[1] / "leg-0" / "first_leg", DOOMED, TOY, "fp32", 3, LENGTH)


CASES = {"leg-0": {"first_leg": first_leg}, "killed": {"killed": killed},
         "leg-1": {"after_kill": after_kill, "next_leg": next_leg, "big": big}, "leg-2": {"next_leg": next_leg},
         "leg-3": {"next_leg": next_leg, "other_split": other_split, "other_precision": other_precision,
                   "memory": memory}}

if __name__ == "__main__":
    main(CASES[Path(sys.argv[1]).name])
