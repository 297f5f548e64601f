"""Cases of single features, for the one-rank launch."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.config.interval import Interval
from pretrain.config.presets import configs_dir
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.errors import PretrainError
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status
from tests.engine.running import finish, run, start


class Scripted:
    """An evaluator that says what it is told to, every two steps."""

    name = "scripted"
    every = Interval(2, "steps")

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def evaluate(self, view: Any) -> EvalResult:
        value = self.values.pop(0) if self.values else 9.0
        return EvalResult({"val/loss": Metric(value, 1, False), "val/perplexity": Metric(math.exp(value), 1, False)})


def plain_deepspeed_json(world: World, folder: Path) -> dict[str, list[float]]:
    """Every file that needs no compiler trains with plain DeepSpeed, without a word of ours."""
    return {str(stage): train_plainly(f"zero{stage}") for stage in range(4)}


def train_plainly(name: str) -> list[float]:
    """Twenty losses of a small model under `configs/deepspeed/NAME.json` alone (three would drown in bf16 rounding)."""
    import deepspeed
    torch.manual_seed(0)
    config = json.loads((configs_dir() / "deepspeed" / f"{name}.json").read_text())
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 1), config=config)
    x = torch.ones(1, 8, dtype=torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32)
    losses = []
    for _ in range(20):
        loss = engine(x).float().square().sum()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    return losses


def init_from(world: World, folder: Path) -> dict[str, Any]:
    """Weights and nothing else travel from a finished run of another stage."""
    run(world, folder, "teacher", engine={"zero_stage": 3}, model={"hooked": True})
    teacher = folder / "runs" / "teacher"
    trainer = start(world, folder, "pupil", train={"length": "5 steps", "init_from": str(teacher)})
    from pretrain.engine.consolidate import find_checkpoint, load_weights
    checkpoint = find_checkpoint(teacher)
    assert checkpoint is not None
    weights = load_weights(checkpoint)
    largest = max(float((p.detach() - weights[n]).abs().max()) for n, p in trainer.engine.model.named_parameters())
    step = trainer.state.step
    finish(trainer)
    try:
        start(world, folder, "misfit", model={"width": 8}, train={"init_from": str(teacher)})
        message = "no error"
    except PretrainError as error:
        message = str(error)
    return {"difference": largest, "step": step, "names": sorted(weights), "message": message}


def plateau_and_patience(world: World, folder: Path) -> dict[str, Any]:
    """The rate is cut after `plateau_patience` bad evaluations, and training ends after `patience`."""
    trainer = start(world, folder, "plateau", [Scripted([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])],
                    schedule={"name": "plateau", "warmup": None, "plateau_patience": 2},
                    eval={"every": "2 steps"}, train={"length": "40 steps", "patience": 4})
    trainer.train()
    result = {"step": trainer.state.step, "factor": trainer.lr.plateau.factor, "best": trainer.state.best,
              "reason": trainer.state.stopped_early, "best_steps": trainer.state.best_steps,
              "pointer": trainer.keeper.folder.read_pointer("best-val/loss").step}
    finish(trainer)
    return result


def target_perplexity(world: World, folder: Path) -> dict[str, Any]:
    """Training ends once validation perplexity is at the target."""
    trainer = start(world, folder, "target", [Scripted([3.0, 2.5, 2.0])], eval={"every": "2 steps"},
                    train={"length": "40 steps", "target_perplexity": 8.0})
    trainer.train()
    result = {"step": trainer.state.step, "reason": trainer.state.stopped_early}
    finish(trainer)
    return result


def divergence(world: World, folder: Path) -> dict[str, Any]:
    """Three bad updates in a row end the run with code 4, and say which batches."""
    trainer = start(world, folder, "diverged", train={"max_bad_steps": 3})
    handle = trainer.engine.model.trained.register_full_backward_hook(lambda m, gi, go: (gi[0] * float("inf"),))
    try:
        trainer.train()
        outcome: dict[str, Any] = {"code": 0, "message": ""}
    except PretrainError as error:
        outcome = {"code": int(error.code), "message": str(error)}
    handle.remove()
    outcome["k"] = trainer.state.k
    finish(trainer)
    return outcome


def retention(world: World, folder: Path) -> list[int]:
    """keep_last 2, keep_every 8 steps, and the best of the scripted evaluations."""
    trainer = start(world, folder, "kept", [Scripted([3.0, 2.0, 1.0])], eval={"every": "2 steps"},
                    checkpoint={"every": "2 steps", "keep_last": 2, "keep_best": 1, "keep_every": "8 steps"})
    trainer.train()
    kept = sorted(ref.step for ref in trainer.keeper.folder.checkpoints())
    finish(trainer)
    return kept


def changed_at_the_same_step(world: World, folder: Path) -> dict[str, Any]:
    """A learning rate that changes right after a save is in the checkpoint that the stop leaves."""
    trainer = start(world, folder, "changed-state", checkpoint={"every": "4 steps"})
    while trainer.state.step < 4:
        trainer.step()
    before = trainer.keeper.folder.checkpoints()
    trainer.state.lr_override = 1e-5
    trainer._save()
    after = trainer.keeper.folder.checkpoints()
    finish(trainer)
    again = start(world, folder, "changed-state", checkpoint={"every": "4 steps"})
    result = {"before": [r.step for r in before], "after": [r.step for r in after], "lr": again.state.lr_override,
              "step": again.state.step}
    finish(again)
    return result


def skipped_rows(world: World, folder: Path) -> dict[str, Any]:
    """The row after a skipped update is finite."""
    from pretrain.monitor.writers import read_metrics
    trainer = start(world, folder, "skipped", train={"length": "4 steps"})
    model = trainer.engine.model
    trainer.step()
    forward = model.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.nll_sum = output.nll_sum * float("nan")
        return output
    model.forward = poisoned
    trainer.step()
    model.forward = forward
    trainer.step()
    rows = list(read_metrics(trainer.keeper.folder))
    result = {"k": trainer.state.k, "step": trainer.state.step, "losses": [row.get("loss") for row in rows]}
    finish(trainer)
    return result


def misspelt_metric(world: World, folder: Path) -> str:
    """A metric that no evaluation gives is an error, with the nearest right one."""
    trainer = start(world, folder, "misspelt", [Scripted([3.0])], eval={"every": "2 steps", "metric": "val/lss"})
    try:
        trainer.train()
        message = "no error"
    except PretrainError as error:
        message = str(error)
    finish(trainer)
    return message


def profiler(world: World, folder: Path) -> list[str]:
    """A trace of steps 3 to 4."""
    trainer = start(world, folder, "traced", train={"length": "6 steps"},
                    monitor={"profile_steps": [3, 4], "tensorboard": False, "progress": "off"})
    trainer.train()
    names = sorted(p.name for p in trainer.keeper.folder.profile_dir.iterdir())
    finish(trainer)
    return names


def readback(world: World, folder: Path) -> dict[str, list[str]]:
    """DeepSpeed does what was written, in every stage and precision; and a changed field is seen."""
    from pretrain.engine.readback import differences
    found = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
        trainer = start(world, folder, f"{stage}-{precision}", engine={"zero_stage": stage, "precision": precision})
        found[f"{stage}-{precision}"] = differences(trainer.engine)
        finish(trainer)
    trainer = start(world, folder, "changed")
    trainer.engine.config["gradient_clipping"] = 7.0
    found["changed"] = differences(trainer.engine)
    finish(trainer)
    return found


class Lines(logging.Handler):
    """What the run says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        root = logging.getLogger("pretrain")
        root.setLevel(logging.INFO)
        root.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("pretrain").removeHandler(self)


def mirror(world: World, folder: Path) -> dict[str, Any]:
    """Every third save is copied; a disk that refuses is told of and stops nothing."""
    from pretrain.engine import mirror as module
    sections = {"train": {"length": "6 steps"}}
    saving = {"every": "1 steps", "keep_last": 1, "keep_best": 0}
    with Lines() as lines:
        run(world, folder, "copied", checkpoint={**saving, "mirror": {"path": str(folder / "disk"), "every": 3}},
            **sections)
    again = start(world, folder, "copied", runs_dir=str(folder / "disk"), **sections)
    resumed = again.state.step, again.state.saves
    finish(again)
    cadence = start(world, folder, "cadence", **sections, checkpoint={
        **saving, "every": "2 steps", "mirror": {"path": str(folder / "disk"), "every": 2}})
    saves = []
    for _ in range(5):  # beside those that are due, one after every other update that nobody asked for
        cadence.step()
        cadence._save()
        saves.append((cadence.state.saves, cadence.state.counted))
    cadence.train()
    finish(cadence)
    (folder / "full").touch()
    wait, module._RETRY_S = module._RETRY_S, 0.0
    try:
        trainer = start(world, folder, "refused", **sections,
                        checkpoint={**saving, "mirror": {"path": str(folder / "full"), "every": 1}})
        for _ in range(4):
            trainer.step()
            deadline = time.monotonic() + 30
            while trainer.keeper._mirror._failed_in_a_row < trainer.state.saves and time.monotonic() < deadline:
                time.sleep(0.01)
        trainer.reporter._status_written = 0.0
        trainer.train()
        status = Status.read(trainer.keeper.folder)
        finish(trainer)
    finally:
        module._RETRY_S = wait
    copies = RunFolder(folder / "disk" / "copied")
    return {"lines": [line for line in lines if "BACKUP" in line], "step": trainer.state.step,
            "copies": [ref.path.name for ref in copies.checkpoints()], "root": str(copies.checkpoints_dir),
            "cadence": [ref.step for ref in RunFolder(folder / "disk" / "cadence").checkpoints()], "saves": saves,
            "last": cadence.state.saves, "resumed": resumed, "message": status.message if status else None,
            "sources": [ref.step for ref in RunFolder(folder / "runs" / "copied").checkpoints()]}


def walk_back(world: World, folder: Path) -> dict[str, Any]:
    """The newest checkpoint is damaged: the one before it is gone on from, to the same end; then all are."""
    sections: dict[str, Any] = {"schedule": {"name": "constant", "warmup": None}, "model": {"dropout": 0.2},
                                "checkpoint": {"every": "2 steps", "keep_last": 9}}
    whole = run(world, folder, "whole", train={"length": "8 steps"}, **sections)
    run(world, folder, "damaged", train={"length": "6 steps"}, **sections)
    root = RunFolder(folder / "runs" / "damaged")

    def damage() -> None:
        with open(root.checkpoints()[0].path / "extra.safetensors", "rb+") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))

    damage()
    with Lines() as lines:
        trainer = start(world, folder, "damaged", train={"length": "8 steps"}, **sections)
    begin = trainer.state.step
    trainer.train()
    parts = finish(trainer)
    names = [ref.path.name for ref in root.checkpoints()]
    for ref in root.checkpoints():
        (ref.path / "state.json").unlink()
    try:
        start(world, folder, "damaged", train={"length": "8 steps"}, **sections)
        outcome: tuple[int, str] = (0, "")
    except PretrainError as error:
        outcome = (int(error.code), str(error))
    status = Status.read(root)
    return {"begin": begin, "whole": whole, "parts": parts, "lines": [line for line in lines if "passed over" in line],
            "names": names, "outcome": outcome, "state": status.state if status else None,
            "left": [ref.path.name for ref in root.checkpoints()]}


def spikes(world: World, folder: Path) -> dict[str, Any]:
    """A batch whose loss is tenfold on the last rank, after 40 ordinary ones: dropped in every stage, or told of."""
    found: dict[str, Any] = {}
    for key, stage, policy, accumulation in (("0", 0, "skip", 1), ("1", 1, "skip", 1), ("2", 2, "skip", 2),
                                             ("3", 3, "skip", 1), ("warn", 2, "warn", 1)):
        trainer = start(world, folder, key, engine={"zero_stage": stage},
                        train={"length": "60 steps", "on_spike": policy},
                        batch={"global_batch_size": 8, "gradient_accumulation_steps": accumulation},
                        schedule={"name": "constant", "warmup": None}, optim={"lr": 0.001})
        factor = 10 if world.rank == world.size - 1 else 1
        while trainer.state.k < 40:
            trainer.step()
        compute = type(trainer.objective).__call__

        def tenfold(objective: Any, model: Any, batch: Any, controls: Any, compute: Any = compute,
                    factor: int = factor) -> Any:
            result = compute(objective, model, batch, controls)
            return type(result)({name: factor * value for name, value in result.sums.items()}, result.metrics)

        before = trainer.engine.read("trained.weight")
        type(trainer.objective).__call__ = tenfold  # type: ignore[method-assign]
        try:
            with Lines() as lines:
                trainer.step()
        finally:
            type(trainer.objective).__call__ = compute  # type: ignore[method-assign]
        moved = float((trainer.engine.read("trained.weight") - before).abs().max())
        trainer.step()
        after = float((trainer.engine.read("trained.weight") - before).abs().max())
        found[key] = {"moved": moved, "after": after, "step": trainer.state.step, "k": trainer.state.k,
                      "skipped": trainer.health.bad_steps.skipped, "spikes": trainer.health.bad_steps.spikes,
                      "lines": lines}
        finish(trainer)
    return found


CASES = {"plain_deepspeed_json": plain_deepspeed_json, "init_from": init_from, "readback": readback,
         "plateau_and_patience": plateau_and_patience, "target_perplexity": target_perplexity,
         "divergence": divergence, "retention": retention, "skipped_rows": skipped_rows,
         "changed_at_the_same_step": changed_at_the_same_step, "misspelt_metric": misspelt_metric, "profiler": profiler,
         "mirror": mirror, "walk_back": walk_back, "spikes": spikes}
