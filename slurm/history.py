"""`slurm/starts.jsonl` of a run folder: every start of every job, why it ended and what was decided.

Written by the batch script's helper only, one line an event, so that a batch script that was thought dead and wakes up
spoils nothing: what it writes stands under its own job and restart number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import DataCorruption
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic

Action = Literal["finish", "requeue", "next", "leave"]
"""finish: no further start; requeue: by the job itself; next: the next job of the chain goes on; leave: Slurm does."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a job."""

    job: str
    restart: int
    nodes: str
    begun: float
    """Unix time, as `ended`."""
    step: int
    """Of the newest checkpoint when it began."""
    fence: int
    """Newest fence when it began: what this start writes has a higher one."""
    ended: float | None = None
    """None where it did not live to say so."""
    cause: str = ""
    """Why the batch script was signalled, if it was."""
    asked: bool = False
    """Whether a request to stop was left in the control folder."""
    reason: str = ""
    """Why it ended."""
    code: int | None = None
    """Exit code of the run."""
    saved: int | None = None
    """Step of the newest checkpoint when it ended."""
    reached: int = 0
    """Furthest step known of it."""
    action: Action | None = None
    excluded: tuple[str, ...] = ()
    """Machines that this start found to be bad."""


def starts_file(folder: RunFolder) -> Path:
    """The record."""
    return folder.slurm_dir / "starts.jsonl"


def read_history(folder: RunFolder) -> list[Start]:
    """Starts in the order in which they began; torn lines are passed over."""
    starts: dict[tuple[str, int], Start] = {}
    try:
        lines = starts_file(folder).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row: dict[str, Any] = json.loads(line)
            event, key = row.pop("event"), (str(row["job"]), int(row["restart"]))
            if event == "begin":
                starts[key] = Start(**row)
            elif key in starts:
                row["excluded"] = tuple(row.get("excluded", starts[key].excluded))
                starts[key] = replace(starts[key], **row)
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(starts.values(), key=lambda start: start.begun)


Event = Literal["begin", "interrupted", "end"]


def note(folder: RunFolder, event: Event, job: str, restart: int, **facts: Any) -> None:
    """Append one event, flushed to the disk. What a full disk or a kill has torn stays on a line of its own."""
    line = json.dumps({"event": event, "job": job, "restart": restart, **facts}) + "\n"
    with open(starts_file(folder), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class Submission:
    """What `pretrain slurm submit` handed to Slurm: one job, or a chain of them."""

    jobs: tuple[str, ...]
    time: float


def read_submissions(folder: RunFolder) -> list[Submission]:
    """Oldest first. Raises DataCorruption."""
    path = folder.slurm_dir / "submissions.json"
    try:
        return [Submission(tuple(row["jobs"]), row["time"]) for row in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorruption(f"{path}: cannot be read ({error}); if no job of this run is queued, remove it") from error


def note_submission(folder: RunFolder, jobs: Sequence[str]) -> None:
    """Add one to the record."""
    rows = [*read_submissions(folder), Submission(tuple(jobs), time.time())]
    write_json_atomic(folder.slurm_dir / "submissions.json", [{"jobs": row.jobs, "time": row.time} for row in rows])
