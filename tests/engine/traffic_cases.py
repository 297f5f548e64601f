"""Two ranks that count what a step of each stage sends; see `test_traffic.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pretrain.config.cost import traffic
from pretrain.config.plan import make_plan
from pretrain.engine.distributed import World
from tests.engine import running
from tests.engine.world import main

LARGE: dict[str, Any] = {"stage3_param_persistence_threshold": 0}
"""A small model as a large one: no weight is small enough to stay gathered between steps."""
LARGER: dict[str, Any] = {**LARGE, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""And none stays gathered between forward and backward."""
SENDS: dict[str, tuple[int, str, int]] = {
    "all_reduce": (0, "tensor", 2), "all_gather_into_tensor": (0, "output_tensor", 1),
    "reduce_scatter_tensor": (1, "input", 1)}
"""Collective -> (position and name of the argument that holds the whole tensor, rounds of a ring)."""
counted: list[tuple[str, float]] = []


def count_collectives() -> None:
    """From now on, note the bytes of each collective on tensors of the model; host-side agreements are of float64."""
    for name in SENDS:
        noting = _noting(name, getattr(dist, name))
        setattr(dist, name, noting)
        setattr(distributed_c10d, name, noting)


def _noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    position, keyword, rounds = SENDS[name]

    def noting(*arguments: Any, **options: Any) -> Any:
        tensor = options[keyword] if keyword in options else arguments[position]
        if tensor.dtype in (torch.float32, torch.bfloat16):
            world = dist.get_world_size()
            counted.append((name, rounds * (world - 1) / world * tensor.numel() * tensor.element_size()))
        return call(*arguments, **options)
    return noting


def case(stage: int, precision: str, accumulation: int, zero: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Bytes of the third step, counted and by formula."""
    def step(world: World, folder: Path) -> dict[str, Any]:
        trainer = running.start(world, folder, "run", train={"length": "4 steps"}, engine={
            "zero_stage": stage, "precision": precision, "deepspeed": {"zero_optimization": zero} if zero else {}},
            batch={"global_batch_size": 4 * accumulation, "gradient_accumulation_steps": accumulation})
        trainer.step()
        trainer.step()
        counted.clear()
        trainer.step()
        found: dict[str, float] = {}
        for name, size in counted:
            found[name] = found.get(name, 0.0) + size
        plan = make_plan(trainer.config, world.size, precision=precision, device="cpu")  # type: ignore[arg-type]
        expected = {part.name: part.bytes for part in traffic(trainer.config, plan)}
        running.finish(trainer)
        return {"counted": found, "expected": expected}
    return step


CASES = {f"stage {stage} {precision} x{accumulation}": case(stage, precision, accumulation,
                                                            LARGE if stage == 3 else None)
         for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16") for accumulation in (1, 3)
         if precision == "fp32" or stage >= 2}
CASES["stage 3 beyond what stays gathered"] = case(3, "fp32", 2, LARGER)

if __name__ == "__main__":
    count_collectives()
    main(CASES)
