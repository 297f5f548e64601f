"""Who holds up the others: what each machine's ranks do by themselves in a step, beside the median of all machines.

A rank's own work is loading data and the forward pass; in everything else it may also be waiting for others. On an
accelerator these are times of the host: a slow loader or disk shows, a slow GPU does not; for that there is
`slurm.checks: full`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.runfolder.holder import fences
from pretrain.runfolder.layout import RunFolder

SLOW = 1.3
"""Own work above this multiple of the median makes a straggler."""
_OWN, _SHARED = ("data", "forward"), ("backward", "step")


@dataclass(frozen=True, slots=True)
class MachineTime:
    """Seconds a step of one machine, of its slowest rank."""

    node: str
    ranks: int
    data: float
    forward: float
    shared: float
    """Backward pass and step, with the waiting that falls into them."""
    over_median: float
    """Own work over the median of all machines."""

    @property
    def straggles(self) -> bool:
        """Whether the others wait for it."""
        return self.over_median > SLOW


def read_times(folder: RunFolder) -> list[dict[str, Any]]:
    """What the ranks of the newest start have left beside their heartbeats; torn files are passed over."""
    claimed = fences(folder.lease_dir)
    found = []
    for path in sorted(folder.heartbeat_dir(claimed[-1]).glob("times-*.json")) if claimed else ():
        try:
            found.append(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return found


def by_machine(rows: Sequence[Mapping[str, Any]], first_step: int) -> list[MachineTime]:
    """Machines, slowest first. `first_step`: where the start began, as seconds count from there. Pure."""
    nodes: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        steps = row["step"] - first_step
        if steps > 0:
            nodes.setdefault(row["node"], []).append({name: value / steps for name, value in row["seconds"].items()})
    slowest = {node: max(ranks, key=lambda each: sum(each[name] for name in _OWN)) for node, ranks in nodes.items()}
    own = {node: sum(each[name] for name in _OWN) for node, each in slowest.items()}
    median = statistics.median(own.values()) if own else 0.0
    found = [MachineTime(node, len(nodes[node]), each["data"], each["forward"], sum(each[name] for name in _SHARED),
                         own[node] / median if median else 1.0) for node, each in slowest.items()]
    return sorted(found, key=lambda machine: machine.over_median, reverse=True)
