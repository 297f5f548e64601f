"""Who holds a run: the identity of a process across machines, and `holder.json` that records it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import psutil

from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import write_json_atomic

HOLDER = "holder.json"


class ResumedFrom(TypedDict):
    """The checkpoint from which a holder went on. Fence 0 is none: a fresh start that follows nothing."""

    step: int
    fence: int
    manifest_sha: str


FRESH: ResumedFrom = {"step": 0, "fence": 0, "manifest_sha": ""}


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A Slurm job and how often it has been restarted."""

    job: str
    restart: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """The job that `environment` (as `os.environ`) speaks of, or None outside Slurm."""
        job = environment.get("SLURM_JOB_ID")
        return cls(job, int(environment.get("SLURM_RESTART_COUNT", "0") or 0)) if job else None


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, never another: the start time tells a reused pid, boot and namespace tell another machine."""

    host: str
    boot_id: str
    pid_ns: str
    pid: int
    pid_start: float

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        pid = os.getpid()
        return cls(*_machine(), pid, _start(pid) or 0.0)

    def gone(self) -> bool:
        """Whether this process is known to have ended. From another machine or pid namespace that cannot be known."""
        if (self.host, self.boot_id, self.pid_ns) != _machine():
            return False
        start = _start(self.pid)
        if start is None:  # also so where /proc hides the processes of other users
            return not psutil.pid_exists(self.pid) or _is_zombie(self.pid)
        return start != self.pid_start


def _machine() -> tuple[str, str, str]:
    """Host name, boot and pid namespace; the last two are empty where there is no /proc."""
    boot_id = pid_ns = ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_ns = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot_id, pid_ns


def _start(pid: int) -> float | None:
    """When a process started (kernel ticks on Linux, else seconds); None if there is none or only its corpse."""
    if not os.path.isdir("/proc/self"):
        try:
            return float(psutil.Process(pid).create_time())
        except psutil.Error:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else float(fields[19])


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@dataclass(frozen=True, slots=True)
class Holder:
    """`holder.json` of one fence."""

    fence: int
    process: ProcessId
    slurm: SlurmJob | None
    since: float
    """Unix time at which the fence was claimed."""
    resumed_from: ResumedFrom | None = None
    """None until the holder has decided where to go on from; it has written nothing by then."""
    released: float | None = None
    """Unix time at which the holder gave the lease back."""

    def write(self, folder: Path) -> None:
        """Write `holder.json` into `folder`."""
        process, slurm = self.process, self.slurm
        write_json_atomic(folder / HOLDER, {
            "host": process.host, "boot_id": process.boot_id, "pid_ns": process.pid_ns, "pid": process.pid,
            "pid_start": process.pid_start, "slurm_job": slurm.job if slurm else None,
            "restart": slurm.restart if slurm else None, "resumed_from": self.resumed_from, "since": self.since,
            "released": self.released})

    @classmethod
    def read(cls, folder: Path) -> Holder | None:
        """The holder of the fence whose folder this is; None where none is recorded. Raises DataCorruption."""
        path = folder / HOLDER
        try:
            raw: dict[str, Any] = json.loads(path.read_bytes())
            process = ProcessId(raw["host"], raw["boot_id"], raw["pid_ns"], raw["pid"], raw["pid_start"])
            slurm = SlurmJob(raw["slurm_job"], raw["restart"]) if raw["slurm_job"] else None
            return cls(int(folder.name), process, slurm, raw["since"], raw["resumed_from"], raw["released"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataCorruption(f"{path}: cannot be read ({error}); if no such run lives, move it aside") from error


def fences(lease_dir: Path) -> list[int]:
    """Fence numbers claimed so far, ascending."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(name) for name in os.listdir(lease_dir) if name.isascii() and name.isdigit())
    return []
