"""A run of two ranks that is killed and started again, and what must hold of its folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from pretrain.engine.shards import open_shards
from pretrain.errors import DataCorruption
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.publish import Manifest
from pretrain.runfolder.whole import newest_whole
from tests.cli.tiny_run import CONFIG, checkpoints, losses, rows, status
from tests.cli.warm import Forked, Warm
from tests.faults.inject import RANKS, REACHED, Point, Victim, statements
from tests.faults.traces import leftovers

COUNTERS = {"saves", "counted", "restarts"}
"""What a restart may change in the stored state."""
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.1},
    "batch": {"micro_batch_size": 2},
    "train": {"length": "12 steps"},
    "checkpoint": {"every": "3 steps", "keep_last": 2, "keep_best": 1, "mirror": {"path": "disk", "every": 1}},
    "eval": {"every": "6 steps"},
}


def write_config(folder: Path) -> None:
    """`tiny.yaml` of two ranks: dropout, two micro-batches a rank, everything that saves and copies."""
    merged = {key: {**value, **SETTINGS.get(key, {})} if isinstance(value, dict) else value
              for key, value in CONFIG.items()}
    merged["launch"] = {**CONFIG["launch"], "nproc": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(merged))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run has to show: everything that must not depend on how often it was killed."""

    losses: dict[int, float]
    evaluations: dict[int, float]
    steps: list[int]
    """Checkpoints that are kept."""
    best: int
    """The one that `best-val-loss` points at."""
    weights: str
    """Digest of every master and moment by name."""
    state: dict[str, Any]
    generators: dict[str, str]
    """Hash of the random state of each rank."""


class Case:
    """A working folder and the command that is given in it, again and again."""

    def __init__(self, warm: Warm, folder: Path, *sets: str) -> None:
        self.warm, self.folder, self.sets = warm, folder, sets
        self.use(folder / "runs/tiny")

    def use(self, root: Path) -> None:
        """The run folder is this one."""
        self.root = root
        self.run_folder = RunFolder(root)

    def start(self, *more: str, before: str = "") -> Forked:
        """The command."""
        words = [word for value in (*self.sets, *more) for word in ("--set", value)]
        return self.warm.start(self.folder, ["train", "tiny.yaml", *words], before=before, environment={})

    def hit(self, point: Point, victim: Victim | str, *more: str) -> Forked:
        """Start, with everything ready to be hit at `point`; returns once the command has ended, and all its ranks."""
        for name in (REACHED, RANKS):
            (self.folder / name).unlink(missing_ok=True)
        run = self.start(*more, before=statements(point, victim, self.folder))
        run.wait(120)
        self.await_ranks()
        assert (self.folder / REACHED).exists(), f"{point.name} was not reached:\n{run.stderr}"
        assert self.reached() == [[point.name, victim, str(point.rank)]]
        return run

    def reached(self) -> list[list[str]]:
        """Points that were reached by the last command."""
        return [json.loads(line) for line in (self.folder / REACHED).read_text().splitlines()]

    def await_ranks(self) -> None:
        """Wait for the ranks of the last command to be gone."""
        ranks = []
        for pid in map(int, (self.folder / RANKS).read_text().split()):
            if psutil.pid_exists(pid):
                ranks.append(psutil.Process(pid))
        assert psutil.wait_procs(ranks, timeout=30)[1] == []

    def newest(self) -> int:
        """Step of the newest whole checkpoint; 0 where there is none. Fails where one that counts is not whole."""
        assert not any(checkpoints(self.root).values())
        try:
            ref = newest_whole(self.run_folder)
        except DataCorruption as error:
            raise AssertionError(str(error)) from error
        return ref.step if ref is not None else 0

    def finish(self, *more: str, before: str = "") -> Forked:
        """The same command again, to its end; nothing half-made is left then, here and in the copy."""
        run = self.start(*more, before=before)
        assert run.wait(120) == 0, run.stderr
        assert status(self.root).state == "done"
        for root in (self.root, self.folder / "disk/tiny"):
            assert leftovers(root) == []
        return run

    def outcome(self) -> Outcome:
        """What it ended with."""
        refs = self.run_folder.checkpoints()
        newest = refs[0]
        assert self.run_folder.read_pointer("latest") == newest
        assert not any(checkpoints(self.root).values())
        state = json.loads((newest.path / "state.json").read_text())
        state["state"] = {key: value for key, value in state["state"].items() if key not in COUNTERS}
        best = self.run_folder.read_pointer("best-val/loss")
        assert best is not None
        files = Manifest.read(newest.path).files
        generators = {name: files[name].sha256 for name in sorted(files) if name.startswith("rng-")}
        return Outcome(losses(self.root), rows(self.root, "val/loss"), [ref.step for ref in refs], best.step,
                       weights(newest), state, generators)

    def mirrored(self) -> list[int]:
        """Steps of the copy, all whole, newest first."""
        copy = RunFolder(self.folder / "disk/tiny")
        assert not any(checkpoints(copy.root).values())
        return [ref.step for ref in copy.checkpoints()]

    def copied_to(self, folder: Path) -> Case:
        """The same run in another working folder."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return Case(self.warm, folder, *self.sets)


def weights(ref: CheckpointRef) -> str:
    """SHA-256 over fp32 masters and moments, parameter by parameter, whatever the world that wrote them."""
    shards = open_shards(ref.path, Manifest.read(ref.path))
    digest = hashlib.sha256(str(shards.step).encode())
    for name in sorted(shards.places):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            digest.update(name.encode() + shards.whole(name, kind).numpy().tobytes())
    return digest.hexdigest()


def new_case(warm: Warm, dataset: Path, folder: Path, *sets: str) -> Case:
    """A working folder with `tiny.yaml` and the dataset as `set`."""
    (folder / "set").symlink_to(dataset)
    write_config(folder)
    return Case(warm, folder, *sets)
