"""Cases of the offload launch: they need DeepSpeed's compiled CPU optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.engine.distributed import World
from tests.engine import shared_cases
from tests.engine.elastic_cases import advance
from tests.engine.feature_cases import train_plainly
from tests.engine.running import finish, run, start
from tests.engine.world import main

WAYS: dict[str, dict[str, Any]] = {
    "2": {"zero_stage": 2}, "3": {"zero_stage": 3},
    "2-optimizer": {"zero_stage": 2, "offload": {"optimizer": "cpu"}},
    "3-optimizer": {"zero_stage": 3, "offload": {"optimizer": "cpu"}},
    "3-both": {"zero_stage": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}},
}


def losses(world: World, folder: Path) -> dict[str, list[float]]:
    """20 losses with accumulation, offloaded and not."""
    return {name: run(world, folder, name, data=shared_cases.UNEVEN, engine=engine,
                      batch={"global_batch_size": 8, "gradient_accumulation_steps": 2})
            for name, engine in WAYS.items()}


def in_turn(world: World, folder: Path) -> list[float]:
    """The same 20 losses, with a restart into another way every few steps: on the device, offloaded, and back."""
    for stop, way in ((5, "3"), (10, "2-optimizer"), (15, "3-both"), (20, "2")):
        trainer = start(world, folder, "in-turn", data=shared_cases.UNEVEN, engine=WAYS[way],
                        batch={"global_batch_size": 8, "gradient_accumulation_steps": 2})
        advance(trainer, stop)
        found = finish(trainer)
    return found


def plain_json(world: World, folder: Path) -> dict[str, list[float]]:
    """The offload files with plain DeepSpeed."""
    return {str(stage): train_plainly(f"zero{stage}-offload") for stage in (2, 3)}


if __name__ == "__main__":
    main({"losses": losses, "in_turn": in_turn, "plain_json": plain_json})
