"""Which machines of a job are bad, from what each found out about itself. Pure but for reading the results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.slurm import SlurmConfig

FATAL_XIDS = {48: "double-bit memory error", 63: "memory page retired", 64: "memory page could not be retired",
              74: "NVLink error", 79: "fallen off the bus", 94: "contained memory error",
              95: "uncontained memory error", 119: "system processor timed out", 120: "system processor error"}
"""Numbers that NVIDIA's table of Xid messages blames on hardware."""
SILENT = "did not answer"
"""Of a machine without a result."""
ABSENT = "absent"
"""In place of GPUs, where there is no program to ask."""
SLOW = 0.7
"""A device or link below this share of the median is bad."""
_SKEW_S = 5.0
_LEAST_DISK = 10e6
_LEAST_FREE = 2**30


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found, by machine."""

    bad: dict[str, str]
    """Machine -> why it is not used."""
    notes: dict[str, str]
    """Machine -> what is worth knowing but no reason to leave it out."""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of one start by machine; torn ones count as none."""
    found = {}
    for path in sorted(folder.glob("machine-*.json")):
        try:
            found[path.stem.removeprefix("machine-")] = json.loads(path.read_bytes())
        except ValueError:
            continue
    return found


def judge(slurm: SlurmConfig, machines: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> Judgement:
    """Pure. A machine without a result is bad: its task hung, or could not be started."""
    bad: dict[str, str] = {}
    notes: dict[str, str] = {}
    for name in machines:
        why = SILENT if name not in results else _alone(slurm, results[name])
        if why:
            bad[name] = why
        elif note := _note(slurm, results[name]):
            notes[name] = note
    if slurm.checks == "full":
        answered = {name: results[name] for name in machines if name in results}
        bad = {**_slow(answered), **bad}
        unfinished = [name for name, row in answered.items() if "flops" not in row and name not in bad]
        bad |= dict.fromkeys(unfinished, "its matrix product or all-reduce did not end")
    return Judgement(bad, {name: note for name, note in notes.items() if name not in bad})


def _alone(slurm: SlurmConfig, row: Mapping[str, Any]) -> str:
    """Why a machine is bad, by itself."""
    if "disk_error" in row:
        return f"cannot write to the run folder ({row['disk_error']})"
    gpus = row.get("gpus", [])
    if not slurm.gpus_per_node or gpus == ABSENT:
        return ""
    if gpus is None:
        return "nvidia-smi does not answer"
    broken = [gpu for gpu in gpus if gpu["index"] is None]
    if broken:
        return f"nvidia-smi: {broken[0]['error']}"
    if len(gpus) < slurm.gpus_per_node:
        return f"{len(gpus)} of {slurm.gpus_per_node} GPUs"
    for gpu in gpus:
        if gpu["uncorrected"]:
            return f"GPU {gpu['index']}: {gpu['uncorrected']} uncorrected memory errors"
        if gpu["pending"]:
            return f"GPU {gpu['index']}: memory pages wait to be retired"
    fatal = next((event for event in row.get("xids") or () if event["xid"] in FATAL_XIDS), None)
    return f"GPU {fatal['device']}: Xid {fatal['xid']}, {FATAL_XIDS[fatal['xid']]}" if fatal else ""


def _note(slurm: SlurmConfig, row: Mapping[str, Any]) -> str:
    told = []
    if abs(row.get("skew", 0.0)) > _SKEW_S:
        told.append(f"clock {row['skew']:+.0f} s off")
    if row.get("disk", _LEAST_DISK) < _LEAST_DISK:
        told.append(f"{row['disk'] / 1e6:.1f} MB/s to the run folder")
    if row.get("free", _LEAST_FREE) < _LEAST_FREE:
        told.append(f"{row['free'] / 1e9:.2f} GB are free where the run folder is")
    if slurm.gpus_per_node and row.get("gpus") == ABSENT:
        told.append("no nvidia-smi: its GPUs are not looked at")
    elif slurm.gpus_per_node and row.get("xids") is None:
        told.append("the kernel's log may not be read: Xid events are not known")
    return "; ".join(told)


def _slow(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Machines with a device far below the median, or all of whose links are."""
    bad = {}
    flops = [rate for row in results.values() for rate in row.get("flops", ())]
    links = [rate for row in results.values() for rate in row.get("links", ())]
    for name, row in results.items():
        slowest = min(row.get("flops", [0.0]), default=0.0)
        if "flops" in row and slowest < SLOW * statistics.median(flops):
            device = row["flops"].index(slowest)
            bad[name] = (f"device {device}: {slowest / 1e12:.3g} TFLOP/s, the median is "
                         f"{statistics.median(flops) / 1e12:.3g}")
        elif row.get("links") and max(row["links"]) < SLOW * statistics.median(links):
            bad[name] = (f"all-reduce {max(row['links']) / 1e9:.3g} GB/s, the median is "
                         f"{statistics.median(links) / 1e9:.3g}")
    return bad
