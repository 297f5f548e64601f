"""What is known of a run and its job, from the run folder and the queue together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config.load import load_run_config
from pretrain.errors import DataCorruption, UserError
from pretrain.monitor.rows import last_row
from pretrain.runfolder.layout import RunFolder, is_run_folder
from pretrain.runfolder.lease import live_holder
from pretrain.runfolder.status import Status
from slurm.history import read_history, read_submissions
from slurm.jobs import QueuedJob


@dataclass(frozen=True, slots=True)
class JobView:
    """A run as `pretrain slurm status` shows it."""

    name: str
    root: str
    job: str | None
    """The job that runs or waits, else the last one."""
    state: str
    """Of the job where the queue knows it, else of the run."""
    why: str
    """Why it waits, or why the last start ended."""
    nodes: str
    step: int
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    """Training time to the last step, waiting not counted."""
    starts: int
    restarts: int
    links_waiting: int
    """Jobs of the chain that wait for the present one."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def run_folder(target: str, jobs: Sequence[QueuedJob]) -> RunFolder:
    """The run that `target` names: a job's number, a run folder, or a config or preset. Raises UserError."""
    if target.isdigit():
        found = next((job for job in jobs if job.id == target), None)
        if found is None:
            raise UserError(f"job {target}: the queue does not know it; name the run folder instead")
        if found.root is None:
            raise UserError(f"job {target} ({found.name}): is none of `pretrain slurm`")
        return RunFolder.open(Path(found.root))
    if is_run_folder(Path(target)):
        return RunFolder(Path(target).resolve())
    config = load_run_config(target).config
    return RunFolder.open((Path(config.runs_dir) / config.name).resolve())


def jobs_of(folder: RunFolder, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """Jobs of this run that the queue knows, oldest first."""
    known = {number for sent in read_submissions(folder) for number in sent.jobs}
    return [job for job in jobs if job.root == str(folder.root) or job.id in known]


def view(folder: RunFolder, jobs: Sequence[QueuedJob]) -> JobView:
    """What is known of a run."""
    mine = jobs_of(folder, jobs)
    live = [job for job in mine if job.live]
    job = next((job for job in live if job.state != "PENDING"), live[0] if live else mine[-1] if mine else None)
    history = read_history(folder)
    last = history[-1] if history else None
    status, row = _status(folder), last_row(folder, "loss")
    loss = row["loss"] if row else None
    present = job is not None and job.state in ("RUNNING", "COMPLETING")
    state = job.state if job is not None and job.live else _ended(folder, status)
    why = job.reason if job is not None and job.state == "PENDING" else ""
    if last is not None and last.reason and not present:
        why = f"{why}; last start: {last.reason}" if why else last.reason
    return JobView(
        name=folder.root.name, root=str(folder.root), job=job.id if job else last.job if last else None, state=state,
        why=why, nodes=job.nodes if job and job.nodes else last.nodes if last else "",
        step=max(status.step if status else 0, int(row["step"] or 0) if row else 0),
        total_steps=status.total_steps if status else None,
        loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        tokens_per_second=_float(row.get("tokens_per_second")) if row else None,
        eta_seconds=_float(row.get("eta_seconds")) if row and present else None,
        starts=len(history), restarts=max(len(history) - 1, job.restarts if job else 0),
        links_waiting=sum(job.state == "PENDING" for job in live) - (job is not None and job.state == "PENDING"))


def _status(folder: RunFolder) -> Status | None:
    try:
        return Status.read(folder)
    except DataCorruption:
        return None


def _ended(folder: RunFolder, status: Status | None) -> str:
    if status is None:
        return "not started"
    return "dead" if status.state == "running" and live_holder(folder) is None else status.state


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
