"""Short runs inside one process of a world: what the cases of every launch are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pretrain.config.load import load_run_config
from pretrain.engine.claim import claim_run
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import Evaluator
from pretrain.engine.setup import prepare
from pretrain.engine.trainer import Trainer
from pretrain.monitor.writers import read_metrics
from pretrain.runfolder.layout import RunFolder

BASE: dict[str, Any] = {
    "model": {"family": "toy"},
    "objective": {"name": "causal_lm"},
    "data": {"seq_len": 16, "source": {"kind": "synthetic", "vocab_size": 64, "samples": 4096}},
    "batch": {"global_batch_size": 8},
    "optim": {"lr": 0.01},
    "schedule": {"warmup": "5 steps"},
    "train": {"length": "20 steps"},
    "engine": {"zero_stage": 2, "precision": "fp32"},
    "checkpoint": {"every": None},
    "eval": {"every": None},
    "monitor": {"log_every": "1 steps", "tensorboard": False, "progress": "off"},
}


def write_config(folder: Path, name: str, **sections: Any) -> Path:
    """A config file: BASE with whole sections merged one level deep."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key in values else value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"runs_dir": str(folder / "runs"), **values, "name": name}))
    return path


def start(world: World, folder: Path, name: str, evaluators: Sequence[Evaluator] = (), **sections: Any) -> Trainer:
    """A prepared trainer, fresh or resumed. Collective: rank 0 writes the file, all read it."""
    path = folder / f"{name}.yaml"
    world.on_main(lambda: write_config(folder, name, **sections) and None)
    loaded = load_run_config(path)
    claim = claim_run(loaded, world)
    trainer = prepare(loaded, world, claim, evaluators, Console(quiet=True))
    trainer.lease = claim.lease  # type: ignore[attr-defined]
    return trainer


def finish(trainer: Trainer) -> list[float]:
    """Close a trainer; rank 0 gets the losses of the run so far."""
    trainer.loader.close()
    trainer.keeper.close()
    if trainer.reporter.writer is not None:
        trainer.reporter.writer.close()
    trainer.engine.release()
    if trainer.lease is not None:  # type: ignore[attr-defined]
        trainer.lease.release()  # type: ignore[attr-defined]
    trainer.engine.world.barrier()
    return losses(trainer.keeper.folder.root)


def run(world: World, folder: Path, name: str, **sections: Any) -> list[float]:
    """Train to the end; the losses at full precision."""
    trainer = start(world, folder, name, **sections)
    trainer.train()
    return finish(trainer)


def losses(root: Path) -> list[float]:
    """Loss of every step of a run folder."""
    return [row["loss"] for row in read_metrics(RunFolder(root)) if row.get("loss") is not None]


def dump(value: Any) -> str:
    """JSON with floats at full precision."""
    return json.dumps(value)
