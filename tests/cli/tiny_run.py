"""A dataset of a few kilobytes, a model of 30 thousand parameters, and what tests ask of a run folder."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest
from pretrain.runfolder.status import Status

WORDS = ["def", "return", "self", "import", "class", "value", "name", "for", "in", "if", "not", "None", "path", "file",
         "open", "read", "write", "data", "index", "list", "key", "error", "raise", "with", "as", "try", "int", "print"]
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {"family": "baseline", "body": "llama", "vocab_size": 300, "hidden_size": 32, "num_layers": 2,
              "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64},
    "data": {"seq_len": 32, "source": {"kind": "shards", "path": "set"}},
    "objective": {"name": "causal_lm"},
    "batch": {"global_batch_size": 8},
    "optim": {"lr": 0.003},
    "schedule": {"warmup": "5 steps"},
    "train": {"length": "60 steps"},
    "engine": {"zero_stage": 2, "precision": "fp32"},
    "checkpoint": {"every": "20 steps"},
    "eval": {"every": "20 steps", "max_batches": 2},
    "monitor": {"log_every": "1 steps", "tensorboard": False, "progress": "off"},
    "launch": {"threads": 1},
}


def make_dataset(folder: Path, seed: int = 0, blocks_per_shard: int = 20) -> Path:
    """Text, tokenizer and shards (three of train) under `folder`; the dataset is `folder`/set."""
    draw = random.Random(seed)
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(40):
        (text / f"{number:03d}.txt").write_text(" ".join(draw.choices(WORDS, k=300)) + "\n")
    prepare(PrepConfig.model_validate({
        "out": str(folder / "set"), "sources": [{"kind": "text", "name": "words", "path": str(text)}],
        "splits": {"val": 0.15}, "tokenizer": {"vocab_size": 300}, "block_tokens": 512,
        "blocks_per_shard": blocks_per_shard, "workers": 1}))
    return folder / "set"


def write_config(folder: Path) -> Path:
    """`tiny.yaml`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def losses(root: Path) -> dict[int, float]:
    """Training loss by step; a step that was logged twice fails."""
    rows = [row for row in read_metrics(RunFolder(root)) if row.get("loss") is not None]
    found = {int(row["step"]): float(row["loss"]) for row in rows}  # type: ignore[arg-type]
    assert len(found) == len(rows)
    return found


def rows(root: Path, key: str) -> dict[int, float]:
    """Values of a metric by step."""
    return {int(row["step"]): float(row[key])  # type: ignore[arg-type]
            for row in read_metrics(RunFolder(root)) if row.get(key) is not None}


def status(root: Path) -> Status:
    """The verdict."""
    found = Status.read(RunFolder(root))
    assert found is not None
    return found


def checkpoints(root: Path) -> dict[int, list[str]]:
    """Problems of each checkpoint that counts, by step."""
    return {ref.step: Manifest.read(ref.path).verify(ref.path) for ref in RunFolder(root).checkpoints()}


def until(condition: Callable[[], Any], timeout_s: float = 60.0, every_s: float = 0.02) -> Any:
    """Wait for `condition` to be true, and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(every_s)
    return found
