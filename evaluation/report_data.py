"""What a run folder says about its run, gathered for a report. Nothing is loaded but small text files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from evaluation.results import RESULTS, Results, leading
from pretrain.errors import DataCorruption
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.holder import Holder, fences
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the run: fresh, or going on from a checkpoint."""

    fence: int
    when: str
    host: str
    resumed_step: int | None
    """None: fresh."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report shows."""

    name: str
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    status: Status | None
    rows: list[dict[str, Any]]
    """Rows of metrics that count, oldest first."""
    results: list[Results]
    """Offline evaluations, newest last."""
    starts: list[Start] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    """Global batches whose update was not finite and was skipped."""
    checkpoints: list[str] = field(default_factory=list)
    """Names of the published checkpoints, newest first."""

    def main_result(self) -> Results | None:
        """The evaluation that speaks for the run."""
        return leading(self.results)

    def headline(self, key: str) -> tuple[float, tuple[float, float] | None] | None:
        """(value, 95% interval) of a metric: of the newest evaluation, else of the last validation in training."""
        main = self.main_result()
        if main is not None:
            metric = main.metrics.get(key)
            return None if metric is None else (metric.value, metric.ci)
        last = {part: self.column(key + part)[1][-1:] for part in ("", "/low", "/high")}
        if not last[""]:
            return None
        return last[""][0], (last["/low"][0], last["/high"][0]) if last["/low"] and last["/high"] else None

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the rows that hold a number at `key`."""
        pairs = [(float(row["step"]), float(row[key])) for row in self.rows
                 if isinstance(row.get("step"), int) and isinstance(row.get(key), (int, float))
                 and math.isfinite(row[key])]
        return [p[0] for p in pairs], [p[1] for p in pairs]


def collect(folder: RunFolder) -> ReportData:
    """Read a run folder. Files that are not there yet are left out; broken ones raise DataCorruption."""
    config_text = folder.config_file.read_text(encoding="utf-8") if folder.config_file.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    return ReportData(
        name=str(config.get("name", folder.root.name)), config_text=config_text, config=config,
        environment=_json(folder.environment_file), status=Status.read(folder), rows=read_metrics(folder),
        results=read_results(folder.eval_dir), starts=_starts(folder), skipped=_skipped(folder),
        checkpoints=[ref.path.name for ref in folder.checkpoints()])


def read_results(folder: Path) -> list[Results]:
    """All results.json below a folder, oldest first."""
    return sorted((Results.read(path) for path in folder.rglob(RESULTS)), key=lambda r: r.created)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataCorruption(f"{path}: cannot be read ({error})") from None
    return value if isinstance(value, dict) else {}


def _starts(folder: RunFolder) -> list[Start]:
    found = []
    for fence in fences(folder.lease_dir):
        holder = Holder.read(folder.lease_dir / str(fence))
        if holder is not None:
            origin = holder.resumed_from
            when = datetime.fromtimestamp(holder.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            step = origin["step"] if origin and origin["fence"] else None
            found.append(Start(fence, when, holder.process.host, step))
    return found


def _skipped(folder: RunFolder) -> list[int]:
    """Skipped global batches, as the newest checkpoint that counts records them."""
    for ref in folder.checkpoints():
        health = _json(ref.path / "state.json").get("health", {})
        return [int(k) for k in health.get("bad_steps", {}).get("skipped", [])]
    return []
