"""Where everything of a run stands, which checkpoints of it count, and the small files that point at them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pretrain.errors import UserError
from pretrain.runfolder.chain import read_chain
from pretrain.runfolder.publish import (
    CONDEMNED,
    MANIFEST,
    READERS,
    is_temporary,
    restore_replaced,
    write_text_atomic,
)

log = logging.getLogger(__name__)
LATEST = "latest"
_PUBLISHED = re.compile(r"step-(\d+)\.f(\d+)")
_COPYING = re.compile(r"\.tmp-copy-(.+)-(\d+)-step-\d+\.f\d+")
_UNFINISHED = re.compile(r"\.tmp-f(\d+)-step-(\d+)")
COPYING = ".tmp-copy-"
"""Prefix of a checkpoint that a backup is copying here, followed by the machine and process that copies."""
TRASH = ".trash-"
"""Prefix of what is being deleted."""
CLAIM = ".claim-"
"""Prefix of a lease that is being claimed."""
PROBE = ".probe-"
"""Prefix of files that only ask the filesystem a question."""
_COPY_AGE = 3600.0
"""Seconds without a change after which a copy from another machine is thought abandoned."""
_REQUEST_AGE = 600.0
"""Seconds after which a half-written control request is thought abandoned."""


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A published checkpoint: the folder `step-N.fF`."""

    path: Path
    step: int
    fence: int

    @classmethod
    def parse(cls, path: Path) -> CheckpointRef | None:
        """The checkpoint that `path` is named as, or None."""
        match = _PUBLISHED.fullmatch(path.name)
        return cls(path, int(match.group(1)), int(match.group(2))) if match else None


def abandoned_copies(checkpoints_dir: Path) -> list[Path]:
    """What backups into this folder left half-copied: their process is gone, or of another machine and long silent."""
    found = []
    for path in checkpoints_dir.glob(COPYING + "*"):
        match = _COPYING.fullmatch(path.name)
        if match is None:
            continue
        host, pid = match.groups()
        with contextlib.suppress(FileNotFoundError):  # it gets its name this moment
            changed = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            if not psutil.pid_exists(int(pid)) if host == socket.gethostname() else time.time() - changed > _COPY_AGE:
                found.append(path)
    return found


def is_run_folder(root: Path) -> bool:
    """Whether `root` is the folder of a run: one that has been started, or a copy of one."""
    return (root / "config.yaml").is_file() or (root / "lease").is_dir()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run. Every path of it is spelled here and nowhere else."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> RunFolder:
        """Make the folder, or take an existing one to go on with. Raises UserError where it cannot be written to."""
        folder = cls(Path(root))
        try:
            for path in (folder.lease_dir, folder.checkpoints_dir, folder.control_dir):
                path.mkdir(parents=True, exist_ok=True)
            probe = folder.root / f"{PROBE}{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{root}: cannot be used as run folder ({error.strerror}: {error.filename}); choose a "
                            "writable runs_dir") from error
        return folder

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """An existing run folder, perhaps read-only. Raises UserError where there is none."""
        folder = cls(Path(root))
        if not folder.root.is_dir():
            raise UserError(f"{root}: there is no such folder")
        if not is_run_folder(folder.root):
            raise UserError(f"{root}: is no run folder: neither config.yaml nor lease/ is in it")
        return folder

    @property
    def config_file(self) -> Path:
        """Resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """Versions and hardware of the last start."""
        return self.root / "environment.json"

    @property
    def lineage_file(self) -> Path:
        """Where a branch began; other runs have none."""
        return self.root / "branch.json"

    @property
    def parent_config_file(self) -> Path:
        """Config of the run that a branch began from, as it was then."""
        return self.root / "parent.yaml"

    @property
    def status_file(self) -> Path:
        """State and verdict."""
        return self.root / "status.json"

    @property
    def lease_dir(self) -> Path:
        """One folder a fence number."""
        return self.root / "lease"

    @property
    def log_file(self) -> Path:
        """Log of all ranks."""
        return self.root / "train.log"

    @property
    def metrics_jsonl(self) -> Path:
        """One row of metrics a line: the record."""
        return self.root / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        """The rows that count, as a table: a view of the record."""
        return self.root / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """Final figures, for families that declare columns of metrics.csv."""
        return self.root / "metrics.json"

    @property
    def metrics_long_csv(self) -> Path:
        """The same with one value a line, for families that declare columns."""
        return self.root / "metrics_long.csv"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def nonfinite_dir(self) -> Path:
        """Batches of updates that were not finite, as each rank had them."""
        return self.root / "nonfinite"

    @property
    def profile_dir(self) -> Path:
        """Profiler traces."""
        return self.root / "profile"

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints and the pointers at them."""
        return self.root / "checkpoints"

    @property
    def control_dir(self) -> Path:
        """Requests to the running process."""
        return self.root / "control"

    @property
    def eval_dir(self) -> Path:
        """Results of evaluations."""
        return self.root / "eval"

    @property
    def export_dir(self) -> Path:
        """Exported models."""
        return self.root / "export"

    @property
    def slurm_dir(self) -> Path:
        """What `pretrain slurm` keeps of the jobs of this run."""
        return self.root / "slurm"

    @property
    def meeting_dir(self) -> Path:
        """Where the ranks of a job learn how to reach rank 0."""
        return self.slurm_dir / "meeting"

    @property
    def report_file(self) -> Path:
        """Report for people."""
        return self.root / "report.html"

    def heartbeat_dir(self, fence: int) -> Path:
        """Signs of life of the ranks of one start."""
        return self.root / "heartbeat" / f"f{fence}"

    def hang_dir(self, fence: int) -> Path:
        """Stacks of the ranks of a start that hung."""
        return self.root / f"hang-f{fence}"

    def tmp_checkpoint(self, step: int, fence: int) -> Path:
        """Where a checkpoint is written before it is published. The folder is not made."""
        return self.checkpoints_dir / f".tmp-f{fence}-step-{step}"

    def final_checkpoint(self, step: int, fence: int) -> CheckpointRef:
        """What the checkpoint will be once published."""
        return CheckpointRef(self.checkpoints_dir / f"step-{step}.f{fence}", step, fence)

    def checkpoints(self) -> list[CheckpointRef]:
        """Published checkpoints that count, newest first. What a stale holder published is not among them."""
        published = list(self.published())
        chain = read_chain(self.lease_dir, (ref.fence for ref in published))
        kept = [ref for ref in published if chain.counts(ref.fence, ref.step)]
        return sorted(kept, key=lambda ref: (ref.fence, ref.step), reverse=True)

    def published(self) -> Iterator[CheckpointRef]:
        """Every published checkpoint, whoever wrote it."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.checkpoints_dir.iterdir():
                ref = CheckpointRef.parse(path)
                if ref is not None and (path / MANIFEST).is_file():
                    yield ref

    def pointer_file(self, name: str) -> Path:
        """The file of a pointer: `latest` or `best-METRIC` (a `/` of the metric's name becomes `-`)."""
        if name != LATEST and not name.startswith("best-"):
            raise ValueError(f'"{name}" is no pointer: latest or best-METRIC')
        return self.checkpoints_dir / re.sub(r"[^A-Za-z0-9._-]", "-", name)

    def write_pointer(self, name: str, ref: CheckpointRef) -> None:
        """Let `name` point at `ref`, in one step."""
        write_text_atomic(self.pointer_file(name), ref.path.name + "\n")

    def read_pointer(self, name: str) -> CheckpointRef | None:
        """The checkpoint that `name` points at; None where there is no such pointer.

        Where the checkpoint is gone or does not count, says so and falls back: `latest` to the newest checkpoint,
        `best-METRIC` to None, because the second best is not known here.
        """
        path = self.pointer_file(name)
        try:
            target = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        known = self.checkpoints()
        found = next((ref for ref in known if ref.path.name == target), None)
        if found is None:
            fallback = known[0] if known and name == LATEST else None
            log.warning("%s: points at %s, which is not there or was written by a stale process; using %s", path,
                        target, fallback.path.name if fallback else "none")
            return fallback
        return found

    def clean_temporaries(self, fence: int) -> list[Path]:
        """Remove what killed processes left half-written, and return it. Called by the holder of `fence` at its start,
        before its first save; a stale process that still writes there fails at its own rename.
        """
        restore_replaced(self.checkpoints_dir)
        found = [path for path in self.checkpoints_dir.iterdir() if path.name.startswith(TRASH)
                 or ((match := _UNFINISHED.fullmatch(path.name)) and int(match.group(1)) <= fence)]
        found += abandoned_copies(self.checkpoints_dir)
        found += self.checkpoints_dir.glob(f"*/{READERS}/{CONDEMNED}")
        found += [*self.root.glob(PROBE + "*"), *self.lease_dir.glob(PROBE + "*"), *self.lease_dir.glob(CLAIM + "*")]
        for parent in (self.root, self.checkpoints_dir, *self.lease_dir.iterdir()):
            found += [path for path in parent.glob(".*") if is_temporary(path.name)]
        oldest = time.time() - _REQUEST_AGE
        for path in self.control_dir.glob(".*"):  # the command line may be writing one this moment
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    found.append(path)
        for path in found:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return found
