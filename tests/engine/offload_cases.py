"""Cases of the offload launch: they need DeepSpeed's compiled CPU optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.config.presets import configs_dir
from pretrain.engine.distributed import World
from tests.engine import shared_cases
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
    import deepspeed
    found = {}
    for stage in (2, 3):
        config = json.loads((configs_dir() / "deepspeed" / f"zero{stage}-offload.json").read_text())
        model = torch.nn.Linear(8, 1)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        x = torch.ones(1, 8, dtype=torch.bfloat16)
        values = []
        for _ in range(3):
            loss = engine(x).float().square().sum()
            engine.backward(loss)
            engine.step()
            values.append(float(loss))
        found[str(stage)] = values
        engine.destroy()
    return found


if __name__ == "__main__":
    main({"losses": losses, "plain_json": plain_json})
