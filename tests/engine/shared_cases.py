"""Cases that are run at several world sizes and compared across them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pretrain.config.interval import Interval
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.errors import Divergence
from pretrain.runfolder.publish import Manifest
from tests.engine.feature_cases import Lines
from tests.engine.running import finish, run, start

UNEVEN = {"seq_len": 16, "source": {"kind": "uneven", "samples": 512}}
"""Samples with 1 to 16 labels each: a mean over micro-batches would differ from the mean over tokens."""


def splits(world: World, folder: Path) -> dict[str, list[float]]:
    """20 losses with the global batch of 8 split over this world, for every stage."""
    accumulation = 4 // world.size
    return {str(stage): run(world, folder, f"stage{stage}", data=UNEVEN, engine={"zero_stage": stage},
                            batch={"global_batch_size": 8, "gradient_accumulation_steps": accumulation})
            for stage in (0, 1, 2, 3)}


def contrastive(world: World, folder: Path) -> dict[str, list[float]]:
    """20 losses of the update objective; the cache chunk is 1 sample at every world size."""
    return {str(stage): run(world, folder, f"stage{stage}", model={"encoder": True},
                            objective={"name": "toy_contrastive"}, engine={"zero_stage": stage},
                            batch={"global_batch_size": 8, "micro_batch_size": 1})
            for stage in (0, 2, 3)}


def bf16(world: World, folder: Path) -> dict[str, list[float]]:
    """20 losses in bf16 on the stages that train it."""
    return {str(stage): run(world, folder, f"stage{stage}", data=UNEVEN,
                            engine={"zero_stage": stage, "precision": "bf16"},
                            batch={"global_batch_size": 8, "gradient_accumulation_steps": 4 // world.size})
            for stage in (2, 3)}


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Undisturbed against stopped at 7 and at 13 and gone on with, dropout and hooks on, every stage and bf16."""
    found: dict[str, Any] = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
        key = f"{stage}-{precision}"
        sections: dict[str, Any] = {"model": {"dropout": 0.2, "hooked": True}, "data": UNEVEN,
                                    "engine": {"zero_stage": stage, "precision": precision}}
        whole = run(world, folder, f"whole-{key}", **sections)
        for stop in (7, 13, 20):
            trainer = start(world, folder, f"parts-{key}", **sections)
            begin = trainer.state.step
            while trainer.state.step < stop:
                trainer.step()
            trainer._save()
            trail = trainer.hooks.state_dict()
            parts = finish(trainer)
        found[key] = {"whole": whole, "parts": parts, "last_start": begin, "calls": trail["calls"]}
    return found


def not_finite(world: World, folder: Path) -> dict[str, Any]:
    """A NaN planted in one rank's gradient at batches 3 and 4: skipped everywhere, weights as if they had not been."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        trainer = start(world, folder, f"stage{stage}", engine={"zero_stage": stage})
        weights: list[float] = []
        with Lines() as lines:
            while (k := trainer.state.k) < 8:
                bad = k in (3, 4)
                handle = _poison(trainer) if bad and world.rank == world.size - 1 else None
                before = _checksum(trainer)
                trainer.step()
                if handle is not None:
                    handle.remove()
                if bad:
                    weights.append(_checksum(trainer) - before)
        found[str(stage)] = {"step": trainer.state.step, "k": trainer.state.k, "moved": weights,
                             "skipped": trainer.health.bad_steps.skipped, "finite": math.isfinite(_checksum(trainer)),
                             "kept": sorted(path.name for path in trainer.keeper.folder.nonfinite_dir.iterdir()),
                             "explained": [line for line in lines if "[NaN DEBUG]" in line and "nonfinite" not in line],
                             "saved": _saved_with_nan(trainer)}
        finish(trainer)
    return found


def _saved_with_nan(trainer: Any) -> dict[str, Any]:
    """What becomes of a checkpoint of weights with one NaN, which the last rank holds."""
    weight = trainer.engine.read("trained.weight")
    weight[-1, -1] = float("nan")
    trainer.engine.write("trained.weight", weight)
    before = [ref.path.name for ref in trainer.keeper.folder.checkpoints()]
    try:
        trainer._save()
    except Divergence as error:
        return {"error": str(error), "new": [ref.path.name for ref in trainer.keeper.folder.checkpoints()
                                             if ref.path.name not in before],
                "left": [path.name for path in trainer.keeper.folder.checkpoints_dir.glob("*tmp*")]}
    return {}


def _poison(trainer: Any) -> Any:
    """Make one gradient of this rank NaN."""
    return trainer.engine.model.trained.register_full_backward_hook(lambda m, gi, go: (gi[0] * float("nan"),))


def _checksum(trainer: Any) -> float:
    return float(trainer.engine.read("trained.weight").double().abs().sum())


def frozen_and_buffers(world: World, folder: Path) -> dict[str, Any]:
    """Frozen weights and fp32 buffers survive bf16, a save and a load, bit for bit."""
    found: dict[str, Any] = {}
    for stage in (2, 3):
        trainer = start(world, folder, f"stage{stage}", engine={"zero_stage": stage, "precision": "bf16"},
                        train={"length": "3 steps"})
        trainer.engine.write("frozen.weight", torch.full((16, 16), 0.125))
        buffer = trainer.engine.model.frequency
        trainer.train()
        exact = bool((buffer == 1.0 + torch.arange(16, dtype=torch.float32) / 3000.0).all())
        dtype = str(buffer.dtype)
        ref = trainer.keeper.folder.checkpoints()[0]
        finish(trainer)
        again = start(world, folder, f"stage{stage}", engine={"zero_stage": stage, "precision": "bf16"},
                      train={"length": "3 steps"})
        frozen = again.engine.read("frozen.weight")
        found[str(stage)] = {"buffer_exact": exact, "buffer_dtype": dtype, "frozen": float(frozen.min()),
                             "resumed_at": again.state.step, "files": sorted(p.name for p in ref.path.iterdir()),
                             "problems": len(Manifest.read(ref.path).verify(ref.path))}
        finish(again)
    return found


def read_write(world: World, folder: Path) -> dict[str, Any]:
    """A hook's write reaches the fp32 master and the copy that forward uses, in every stage and precision."""
    found: dict[str, Any] = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
        trainer = start(world, folder, f"{stage}-{precision}", engine={"zero_stage": stage, "precision": precision})
        trainer.engine.write("trained.weight", torch.full((16, 16), 0.3))
        master = trainer.engine.read("trained.weight")
        from deepspeed.runtime.zero import GatheredParameters
        with GatheredParameters([trainer.engine.model.trained.weight], enabled=stage == 3):
            used = trainer.engine.model.trained.weight.detach().float().clone()
        found[f"{stage}-{precision}"] = {"master": [float(master.min()), float(master.max())],
                                         "used": [float(used.min()), float(used.max())]}
        finish(trainer)
    return found


class Looks:
    """An evaluator that notes what it is told of the gradients."""

    name = "looks"
    every = Interval(2, "steps")

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def evaluate(self, view: Any) -> EvalResult:
        self.seen.append(view.zero_gradients)
        return EvalResult({"val/loss": Metric(1.0, 1, False), "val/perplexity": Metric(2.0, 1, False)})


def dead_matrices(world: World, folder: Path) -> dict[str, list[float | None]]:
    """What evaluations after steps 0, 2 and 4 see of the three matrices; after step 2 one of them is cut off."""
    found = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
        looks = Looks()
        trainer = start(world, folder, f"{stage}-{precision}", [looks],
                        engine={"zero_stage": stage, "precision": precision}, train={"length": "4 steps"},
                        batch={"global_batch_size": 8, "gradient_accumulation_steps": 4 // world.size},
                        eval={"every": "2 steps", "at_start": True})
        trainer.evaluations.run(trainer.evaluators, trainer.state, trainer.progress, whole=True, select=False)
        for step in range(4):
            if step == 2:
                trainer.engine.model.trained.register_forward_hook(lambda module, given, out: out.detach() + 0 * out)
            trainer.step()
        trainer.evaluations.run(trainer.evaluators, trainer.state, trainer.progress, whole=True, select=False)
        found[f"{stage}-{precision}"] = looks.seen
        finish(trainer)
    return found
