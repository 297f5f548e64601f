"""Cases of the offload launch: they need DeepSpeed's compiled CPU optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.engine.distributed import World
from tests.engine import shared_cases
from tests.engine.feature_cases import train_plainly
from tests.engine.running import run
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


def plain_json(world: World, folder: Path) -> dict[str, list[float]]:
    """The offload files with plain DeepSpeed."""
    return {str(stage): train_plainly(f"zero{stage}-offload") for stage in (2, 3)}


if __name__ == "__main__":
    main({"losses": losses, "plain_json": plain_json})
