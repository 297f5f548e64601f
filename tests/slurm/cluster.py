"""A running throw-away cluster and what tests ask of it.

Limits of waiting are there to end a test that fails: they are many times what an idle machine needs.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.load import LoadedConfig, load_run_config
from pretrain.monitor.rows import last_row, read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest
from pretrain.runfolder.status import Status
from slurm.history import Start, read_history
from slurm.jobs import QueuedJob, parse_jobs
from slurm.script import Place
from slurm.submit import submit
from tests.slurm.payload import load_vector, reference

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
PAYLOAD = Path(__file__).with_name("payload.py")
CONFIG: dict[str, Any] = {
    "runs_dir": "runs",
    "model": {"family": "baseline", "body": "llama", "vocab_size": 64, "hidden_size": 32, "num_layers": 2,
              "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64},
    "data": {"seq_len": 16, "source": {"kind": "synthetic", "vocab_size": 64, "samples": 4096}},
    "objective": {"name": "causal_lm"},
    "batch": {"global_batch_size": 12},
    "optim": {"lr": 0.003},
    "schedule": {"warmup": "5 steps"},
    "engine": {"zero_stage": 2, "precision": "fp32"},
    "eval": {"every": None},
    "monitor": {"log_every": "1 steps", "tensorboard": False, "progress": "off"},
    "launch": {"threads": 1, "timeout": 60, "hang_timeout": 60},
}
JOB: dict[str, Any] = {"time": "10:00", "nodes": 4, "save_before": 20, "grace": 5, "exclusive": False}
SLOW_STEPS = {"PAYLOAD_STEP_S": "0.1"}


def why_not(mode: str) -> str | None:
    """Why a cluster cannot be started here, None where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: `make slurm-deps`"
    if mode != "plain" and os.geteuid():
        return f"mode {mode} of the test cluster needs root, for namespaces"
    if mode != "plain" and subprocess.run(["unshare", "--pid", "--uts", "--mount", "--fork", "true"],
                                          capture_output=True, check=False).returncode:
        return "this container may not make namespaces (unshare failed)"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """One cluster, between `start` and `stop`."""

    mode: str
    nodes: int = 4
    gpus: int = 0
    state: Path = field(init=False)
    environment: dict[str, str] = field(init=False)

    def start(self) -> None:
        # Unix sockets lie below it: a path of pytest would be too long for them.
        self.state = Path(tempfile.mkdtemp(prefix="sc.", dir="/tmp"))
        self.disk.mkdir()
        if self.mode != "plain":  # before the nodes are there: they see what is mounted by then
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", self.disk], check=True)
        self._do("start", "--nodes", str(self.nodes), "--mode", self.mode, "--gpus", str(self.gpus), "--cpus", "64")
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.state / "slurm.conf")}
        if self.mode == "netns":
            self.environment["PATH"] = f"{self.state / 'bin'}:{self.environment['PATH']}"

    def stop(self) -> None:
        if self.mode != "plain":
            subprocess.run(["umount", "--lazy", self.disk], check=False)
        self._do("stop", "--purge")

    @property
    def disk(self) -> Path:
        """A disk of 4 MB that all nodes see."""
        return self.state / "disk"

    def _do(self, command: str, *arguments: str) -> str:
        done = subprocess.run([SCRIPT, command, self.state, *arguments], capture_output=True, text=True, timeout=240,
                              check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def break_down(self, command: str, node: str = "") -> None:
        """crash, kill-slurmd, unplug, plug or up a node; restart-ctld."""
        self._do(command, *([node] if node else []))

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a program of Slurm, or of any, on the login node."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> QueuedJob:
        return next(job for job in parse_jobs(self.run("squeue", "--json")) if job.id == number)

    def wait(self, number: str, *states: str, timeout_s: float = 180.0) -> QueuedJob:
        """The job, once it is in one of `states`."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number)).state not in states:
            assert time.monotonic() < deadline, f"job {number} is {job.state} ({job.reason}), not {states}"
            time.sleep(0.2)
        return job

    def settle(self) -> None:
        """End all jobs and bring back every node."""
        user = f"--user={getpass.getuser()}"
        self.run("scancel", "--signal=KILL", "--full", user, check=False)
        self.run("scancel", user, check=False)
        for number in range(1, self.nodes + 1):
            if self.mode == "netns":
                self.break_down("plug", f"n{number}")
            self.break_down("up", f"n{number}")
        until(lambda: not self.run("squeue", "-h", "-t", "R,CG,PD,S").strip())
        until(lambda: self.run("sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D").split() == [str(self.nodes)])


@dataclass
class Trial:
    """A run of the payload, or of `pretrain train`, as a job of a cluster."""

    cluster: Cluster
    loaded: LoadedConfig
    root: Path
    numbers: list[str]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)

    @property
    def number(self) -> str:
        return self.numbers[0]

    @property
    def history(self) -> list[Start]:
        return read_history(self.folder)

    @property
    def reasons(self) -> list[str]:
        return [start.reason for start in self.history]

    def log(self) -> str:
        """Everything that the batch scripts and ranks have written, to explain a failure."""
        files = sorted((self.root / "slurm" / "log").rglob("*.*"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files if path.is_file())

    def end(self, timeout_s: float = 200.0, *states: str) -> QueuedJob:
        """Wait for the end of the (last) job."""
        try:
            return self.cluster.wait(self.numbers[-1], *(states or ("COMPLETED",)), timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def step(self) -> int:
        """Furthest step of the present start."""
        row = last_row(self.folder, "loss")
        return int(row["step"] or 0) if row else 0


def payload_config(folder: Path, steps: int, *, every: int = 10, name: str = "run", env: dict[str, str] | None = None,
                   **slurm: Any) -> LoadedConfig:
    """A short run; the payload does not use its model."""
    values = {**CONFIG, "name": name, "train": {"length": f"{steps} steps"},
              "checkpoint": {"every": f"{every} steps", "keep_last": 2}, "slurm": {**JOB, "env": env or {}, **slurm}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_run_config(path)


def submitted(cluster: Cluster, folder: Path, loaded: LoadedConfig, monkeypatch: Any, *, payload: bool = True,
              command: Sequence[str] | None = None) -> Trial:
    """Submit through the project's own code. Ranks run the payload, else `command`, else `pretrain train`."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    root = folder / "runs" / loaded.config.name
    if payload and command is None:
        command = [str(PAYLOAD), str(root / "slurm/config.yaml")]
    job, numbers = submit(loaded, Place(folder, sys.executable), command=command)
    assert Path(job.root) == root
    return Trial(cluster, loaded, root, numbers)


def assert_undisturbed(trial: Trial, steps: int) -> None:
    """Every step once, with the loss of a run that nothing disturbed; the last checkpoint whole and right."""
    expected = reference(steps, 12)
    rows = [(row["step"], row["loss"]) for row in read_metrics(trial.folder) if row.get("loss") is not None]
    assert rows == [(step, loss) for step, (loss, _) in enumerate(expected, 1)], trial.log()
    status = Status.read(trial.folder)
    assert status is not None
    assert (status.state, status.step) == ("done", steps)
    newest = trial.folder.checkpoints()[0]
    assert newest.step == steps
    assert trial.folder.read_pointer("latest") == newest
    for ref in trial.folder.checkpoints():
        assert Manifest.read(ref.path).verify(ref.path) == []
        assert load_vector(ref.path) == expected[ref.step - 1][1]


def until(condition: Callable[[], Any], timeout_s: float = 150.0, every_s: float = 0.1) -> Any:
    """Wait for `condition` to be true, and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(every_s)
    return found
