"""Jobs as `squeue --json` shows them, in the shapes of old and new Slurm.

Since 23.02 numbers that may be unset are objects {set, infinite, number}, since 23.11 states are lists; before, both
were plain. Nothing here needs accounting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import UserError

MARK = "pretrain:"
"""Beginning of the comment of our jobs; the run folder follows."""
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
        "SIGNALING", "STOPPED", "STAGE_OUT")
"""States in which a job may still do something."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """One job that the controller knows."""

    id: str
    name: str
    user: str
    state: str
    reason: str
    """Why it waits; empty where it does not."""
    nodes: str
    """Node list, empty while it waits."""
    node_count: int
    restarts: int
    partition: str
    submitted: int | None
    """Unix times; None where not known."""
    started: int | None
    ends: int | None
    time_limit_minutes: int | None
    root: str | None
    """Run folder, for jobs of ours."""

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE


def parse_jobs(text: str) -> list[QueuedJob]:
    """Jobs in the output of `squeue --json`, by number. Raises UserError where it is none."""
    try:
        rows = json.loads(text)["jobs"]
        jobs = [_job(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"squeue --json: its answer cannot be read ({type(error).__name__}: {error})") from error
    return sorted(jobs, key=lambda job: int(job.id))


def _job(row: Mapping[str, Any]) -> QueuedJob:
    comment = str(row.get("comment") or "")
    reason = str(row.get("state_reason") or "")
    return QueuedJob(
        id=str(row["job_id"]), name=str(row.get("name") or ""), user=str(row.get("user_name") or ""),
        state=_state(row["job_state"]), reason="" if reason in ("None", "NONE") else reason,
        nodes=str(row.get("nodes") or ""), node_count=_number(row.get("node_count")) or 0,
        restarts=_number(row.get("restart_cnt")) or 0, partition=str(row.get("partition") or ""),
        submitted=_number(row.get("submit_time")) or None, started=_number(row.get("start_time")) or None,
        ends=_number(row.get("end_time")) or None, time_limit_minutes=_number(row.get("time_limit")),
        root=comment.removeprefix(MARK) if comment.startswith(MARK) else None)


def _state(value: Any) -> str:
    """The state that matters of a text or a list: newer Slurm lists flags such as COMPLETING after the base state."""
    states = [value] if isinstance(value, str) else [str(item) for item in value]
    if not states:
        raise ValueError("job_state is an empty list")
    return next((state for state in ("COMPLETING", "REQUEUE_HOLD", "REQUEUED") if state in states), states[0])


def _number(value: Any) -> int | None:
    if isinstance(value, Mapping):
        return int(value["number"]) if value.get("set") and not value.get("infinite") else None
    return None if value is None else int(value)
