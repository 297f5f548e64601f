"""Runs that go back to a checkpoint by themselves, against runs that never met what they go back for."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.distributed import World
from pretrain.engine.trainer import Trainer
from pretrain.errors import PretrainError
from pretrain.monitor.rows import read_metrics
from pretrain.objectives.causal_lm import CausalLM
from pretrain.runfolder.status import Status
from tests.engine.feature_cases import Lines
from tests.engine.running import finish, start
from tests.engine.toy import ToyContrastive

CHECKPOINT = 32
SPIKE = 34
LENGTH = 40
STAGES = {"0": {"zero_stage": 0}, "1": {"zero_stage": 1}, "2": {"zero_stage": 2}, "3": {"zero_stage": 3},
          "3-bf16": {"zero_stage": 3, "precision": "bf16"}}
CONTRASTIVE: dict[str, Any] = {"model": {"encoder": True, "dropout": 0.2, "hooked": True},
                               "objective": {"name": "toy_contrastive"},
                               "batch": {"global_batch_size": 8, "micro_batch_size": 1}}
KEYS = {**{name: {"engine": engine} for name, engine in STAGES.items()},
        "contrastive-2": {**CONTRASTIVE, "engine": {"zero_stage": 2}}}


def sections(key: str, **train: Any) -> dict[str, Any]:
    """A run that saves at step 32 and goes back when its loss spikes."""
    return {"model": {"dropout": 0.2, "hooked": True}, "schedule": {"name": "constant", "warmup": None},
            "optim": {"lr": 0.001}, "checkpoint": {"every": f"{CHECKPOINT} steps", "keep_last": 9},
            "train": {"length": f"{LENGTH} steps", "on_spike": "rewind", **train}, **KEYS[key]}


@contextlib.contextmanager
def planted(world: World, batches: Collection[int], factor: float = 10.0) -> Iterator[None]:
    """The loss of these global batches is multiplied, on the last rank only."""
    compute, run = CausalLM.__call__, ToyContrastive.run

    def spoilt(objective: Any, model: Any, batch: Any, controls: Any) -> Any:
        result = compute(objective, model, batch, controls)
        bad = int(batch.sample_ids[0]) // 8 in batches and world.rank == world.size - 1
        return type(result)({n: (factor if bad else 1) * v for n, v in result.sums.items()}, result.metrics)

    def spoilt_update(objective: Any, handle: Any, micro_batches: Any, controls: Any) -> Any:
        bad = int(micro_batches[0].sample_ids[0]) // 8 in batches
        result = run(objective, handle, micro_batches, controls)
        return type(result)(result.loss * (factor if bad else 1), result.metrics, result.finite)

    CausalLM.__call__, ToyContrastive.run = spoilt, spoilt_update  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CausalLM.__call__, ToyContrastive.run = compute, run  # type: ignore[method-assign]


def digest(trainer: Trainer) -> str:
    """Every bit of the weights, the buffers, the hooks' state and the random state."""
    found = hashlib.sha256()
    for name, _ in sorted(trainer.engine.model.named_parameters()):
        found.update(trainer.engine.read(name).numpy().tobytes())
    for _, buffer in sorted(trainer.engine.model.named_buffers()):
        found.update(buffer.float().numpy().tobytes())
    found.update(repr(sorted((k, v.tolist() if torch.is_tensor(v) else v)
                             for k, v in trainer.hooks.state_dict().items())).encode())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Train to the end; what came of it."""
    trainer.train()
    found = {"digest": digest(trainer), "step": trainer.state.step, "k": trainer.state.k,
             "rewinds": trainer.state.rewinds, "skipped": trainer.health.bad_steps.skipped}
    finish(trainer)
    return found


def rewinds(world: World, folder: Path) -> dict[str, Any]:
    """A spike at batch 34 against a run that jumps from batch 32 to batch 35 by hand, every stage and protocol."""
    found: dict[str, Any] = {}
    for key in KEYS:
        name = f"spike-{key}"
        with planted(world, [SPIKE]), Lines() as lines:
            spike = outcome(start(world, folder, name, **sections(key)))
        trainer = start(world, folder, f"jump-{key}", **sections(key))
        while trainer.state.step < CHECKPOINT:
            trainer.step()
        finish(trainer)
        trainer = start(world, folder, f"jump-{key}", **sections(key))
        trainer.loader.close()
        trainer.loader, trainer.state.k = trainer.open_loader(SPIKE + 1), SPIKE + 1
        found[key] = {"spike": spike, "jump": outcome(trainer), "lines": lines}
        rows = read_metrics(trainer.keeper.folder.open(folder / "runs" / name)) if world.is_main else []
        found[key]["rows"] = [row["step"] for row in rows if row.get("loss") is not None]
        found[key]["told"] = [row for row in rows if row.get("rewind")]
    return found


def killed(world: World, folder: Path) -> dict[str, Any]:
    """Killed before and after what a return leads to is saved; the runs that go on, against one that was not killed."""
    found: dict[str, Any] = {}
    for when in ("never", "before", "after"):
        with planted(world, [SPIKE]):
            trainer = start(world, folder, when, **sections("2"))
            if when == "before":
                trainer._save = _raise  # type: ignore[method-assign]
                while trainer.state.k < CHECKPOINT:
                    del trainer._save
                    trainer.step()
                    trainer._save = _raise  # type: ignore[method-assign]
                with contextlib.suppress(KeyError):
                    while True:
                        trainer.step()
            while when == "after" and not trainer.state.rewinds:
                trainer.step()
            if when != "never":
                finish(trainer)
                trainer = start(world, folder, when, **sections("2"))
            begun = {"at_step": trainer.state.step, "at_k": trainer.state.k}
            found[when] = outcome(trainer) | begun
    status = Status.read(trainer.keeper.folder) if world.is_main else None
    found["status"] = status.rewinds if status is not None else None
    return found


def _raise(*_: Any, **__: Any) -> bool:
    raise KeyError("killed")


def ends(world: World, folder: Path) -> dict[str, Any]:
    """What else a run with `rewind` meets: no checkpoint yet, no way past, updates that are not finite."""
    found: dict[str, Any] = {}
    for key in ("2", "contrastive-2"):
        early = {**sections(key), "checkpoint": {"every": "38 steps"}}
        with planted(world, [SPIKE]), Lines() as lines:
            found[f"early-{key}"] = outcome(start(world, folder, f"early-{key}", **early)) | {"lines": lines}
    warned = sections("2", on_spike="warn")
    with planted(world, [SPIKE]), Lines() as lines:
        found["warn"] = outcome(start(world, folder, "warn", **warned)) | {"lines": lines}
    with planted(world, range(SPIKE, 10 * SPIKE)):
        trainer = start(world, folder, "stuck", **sections("2", max_rewinds=2))
        try:
            trainer.train()
            code, message = 0, ""
        except PretrainError as error:
            code, message = int(error.code), str(error)
        finish(trainer)
    found["stuck"] = {"code": code, "message": message, "rewinds": trainer.state.rewinds}
    with planted(world, range(SPIKE, SPIKE + 3), float("nan")), Lines() as lines:
        found["not finite"] = outcome(start(world, folder, "nan", **sections("3", max_bad_steps=3))) | {"lines": lines}
    damage = start(world, folder, "damaged", **{**sections("2"), "checkpoint": {"every": "16 steps", "keep_last": 9}})
    with planted(world, [SPIKE]):
        while damage.state.k < SPIKE:
            damage.step()
        newest = damage.keeper.folder.checkpoints()[0]
        world.on_main(lambda: (newest.path / "extra.safetensors").write_bytes(b"") and None)
        found["damaged"] = outcome(damage)
    found["damaged"]["names"] = sorted(p.name for p in damage.keeper.folder.checkpoints_dir.glob("*step*"))
    return found


CASES = {"rewinds": rewinds, "rewinds_killed": killed, "rewinds_end": ends}
