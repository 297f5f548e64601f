"""What the controller says of a job, as the batch script hands it on: state, time left, bad machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pretrain.config.slurm import parse_time
from pretrain.engine.ranks import expand_nodes

Cause = Literal["time limit", "preempted", "cancelled", "requeued by Slurm", "asked"]
_SLACK_S = 120
"""Seconds by which the signal may come before `save_before`: Slurm sends it up to 60 s early."""
_ENDED_S = 30
"""Seconds left at which a job that is being ended has met its time limit."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The controller's view; empty fields where it did not answer."""

    state: str = ""
    """As RUNNING, COMPLETING, CANCELLED."""
    restarts: int | None = None
    """How often Slurm has put the job back into the queue, the present time included."""
    preempted: bool = False
    seconds_left: int | None = None
    bad_nodes: tuple[tuple[str, str], ...] = ()
    """(machine, state) of machines that are down, drained or do not answer."""

    @classmethod
    def parse(cls, text: str) -> Facts:
        """Pure. What cannot be read is left empty."""
        job = _field(text, "Restarts")
        left = re.search(r"^TimeLeft=(\S+)$", text, re.MULTILINE)
        bad = dict(re.findall(r"^BadNode=(\S+) (\S+)$", text, re.MULTILINE))
        return cls(state=_field(text, "JobState") or "", restarts=int(job) if job and job.isdigit() else None,
                   preempted=(_field(text, "PreemptTime") or "None") not in ("None", "N/A", "Unknown"),
                   seconds_left=_seconds(left.group(1)) if left else None, bad_nodes=tuple(sorted(bad.items())))

    def failed(self, nodes: str) -> list[str]:
        """Machines of the list `nodes` that cannot be used, each with its state."""
        mine = set(expand_nodes(nodes)) if nodes else set()
        return [f"{name} ({state})" for name, state in self.bad_nodes if name in mine]


def cause_of(facts: Facts, restart: int, save_before: int) -> Cause:
    """Why the batch script of start number `restart` was sent a signal.

    Slurm says COMPLETING of every job that it is ending, for whatever reason; the reason is told by the rest.
    """
    left = facts.seconds_left
    if facts.restarts is not None and facts.restarts > restart:
        return "requeued by Slurm"
    if facts.preempted:
        return "preempted"
    if facts.state == "COMPLETING":
        return "time limit" if left is not None and left <= _ENDED_S else "cancelled"
    if facts.state == "CANCELLED":
        return "cancelled"
    return "time limit" if left is not None and left <= save_before + _SLACK_S else "asked"


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"(?:^|\s){name}=(\S+)", text)
    return match.group(1) if match else None


def _seconds(text: str) -> int | None:
    """`1-02:03:04`, `3:04`; None for UNLIMITED and the like. squeue writes M:SS, which a time limit would not mean."""
    if re.fullmatch(r"\d+:\d+", text):
        minutes, seconds = text.split(":")
        return int(minutes) * 60 + int(seconds)
    return parse_time(text) if re.fullmatch(r"[\d:-]+", text) else 0 if text == "INVALID" else None
