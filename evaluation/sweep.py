"""The table of a sweep: each row over its seeds, and its difference from the reference, seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from evaluation.report_data import read_results
from pretrain.config.load import load_run_config
from pretrain.config.suggest import nearest
from pretrain.config.sweep import SweepConfig
from pretrain.errors import UserError
from pretrain.metrics.paired import paired_difference
from pretrain.monitor.rows import Row, read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic, write_text_atomic

_LOW = "/low"
"""Ends the key of an interval's lower end in a row of metrics."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one row."""

    row: str
    metric: str
    values: dict[int, float]
    """By seed."""
    mean: float
    std: float | None
    """Sample standard deviation; None with one seed."""
    minimum: float
    maximum: float
    difference: float | None
    """Mean difference from the reference over the seeds that both have; None for the reference itself."""
    interval: tuple[float, float] | None
    """95%, Student's t over the pairs; None with fewer than two."""
    lowest: float | None = None
    """The lowest lower end of the runs' own 95% intervals; None where a run has none."""


def run_figures(root: Path, at: Literal["final", "best"] = "final") -> dict[str, float]:
    """The evaluated figures of a finished run by name.

    Those of evaluations in training at the last step, or at the best one by `eval.metric`; then those of results.json
    files of the evaluated step, which win.
    """
    folder = RunFolder.open(root)
    rows = [row for row in read_metrics(folder) if any("/" in key for key in row)]
    step = _step_of(folder, rows, at)
    found: dict[str, float] = {}
    for row in rows:
        if row["step"] == step:
            found |= {key: float(value) for key, value in row.items()
                      if "/" in key and isinstance(value, (int, float)) and math.isfinite(value)}
    for results in read_results(folder.eval_dir):
        if results.step in (step, None):
            found |= {name: record.value for name, record in results.metrics.items()}
    return found


def run_lower_bounds(root: Path, at: Literal["final", "best"] = "final") -> dict[str, float]:
    """Lower ends of the 95% intervals of what `run_figures` finds, by name of the figure; not all have one."""
    folder = RunFolder.open(root)
    rows = [row for row in read_metrics(folder) if any("/" in key for key in row)]
    step = _step_of(folder, rows, at)
    found = {key.removesuffix(_LOW): float(value) for row in rows if row["step"] == step for key, value in row.items()
             if key.endswith(_LOW) and isinstance(value, (int, float))}
    return found | {name: record.ci[0] for results in read_results(folder.eval_dir) if results.step in (step, None)
                    for name, record in results.metrics.items() if record.ci is not None}


def _step_of(folder: RunFolder, rows: Sequence[Row], at: Literal["final", "best"]) -> int | None:
    """The evaluated step; None where nothing was evaluated in training. `rows`: those with figures of evaluations."""
    step = _best_step(folder) if at == "best" else None
    return max(int(row["step"] or 0) for row in rows) if rows and step is None else step


def _best_step(folder: RunFolder) -> int | None:
    for ref in folder.checkpoints():
        steps = json.loads((ref.path / "state.json").read_bytes())["state"]["best_steps"]
        return int(steps[-1]) if steps else None
    return None


def metrics_of(config: SweepConfig) -> list[str]:
    """What the table shows: as configured, else what the runs select their best model by."""
    if config.metrics:
        return config.metrics
    return list(dict.fromkeys(load_run_config(run.target, run.sets).config.eval.metric for run in config.runs()))


def sweep_cells(config: SweepConfig, finished: dict[str, dict[str, float]],
                lower_bounds: dict[str, dict[str, float]] | None = None) -> list[Cell]:
    """Cells by row and metric; `finished` has the figures of finished runs by name of the run, `lower_bounds` the
    lower ends of their intervals.

    Raises UserError for a metric that no finished run has.
    """
    cells = []
    known = sorted({name for figures in finished.values() for name in figures})
    for metric in metrics_of(config):
        if finished and metric not in known:
            raise UserError(f'metrics: no run has "{metric}"{nearest(metric, known)}; they have {", ".join(known)}')
        by_row: dict[str, dict[int, float]] = {row: {} for row in config.rows}
        lows: dict[str, list[float | None]] = {row: [] for row in config.rows}
        for run in config.runs():
            if metric in finished.get(run.name, {}):
                by_row[run.row][run.seed] = finished[run.name][metric]
                lows[run.row].append((lower_bounds or {}).get(run.name, {}).get(metric))
        reference = by_row[config.compared_with]
        cells += [_cell(row, metric, values, None if row == config.compared_with else reference, lows[row])
                  for row, values in by_row.items() if values]
    return cells


def _cell(row: str, metric: str, values: dict[int, float], reference: dict[int, float] | None,
          lows: Sequence[float | None]) -> Cell:
    difference, interval = None, None
    shared = [seed for seed in values if reference is not None and seed in reference]
    if reference is not None and shared:
        difference, interval = paired_difference([values[s] for s in shared], [reference[s] for s in shared])
    numbers = list(values.values())
    return Cell(row, metric, values, statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None,
                min(numbers), max(numbers), difference, interval,
                min(known) if len(known := [low for low in lows if low is not None]) == len(numbers) else None)


_HEADER = ("", "metric", "seeds", "mean", "std", "min", "max", "lowest bound", "difference (95%)")


def _texts(cell: Cell) -> tuple[str, ...]:
    difference = "" if cell.difference is None else f"{cell.difference:+.4f}"
    if cell.interval is not None:
        difference += f" ({cell.interval[0]:+.4f} to {cell.interval[1]:+.4f})"
    return (cell.row, cell.metric, str(len(cell.values)), f"{cell.mean:.4f}",
            "-" if cell.std is None else f"{cell.std:.4f}", f"{cell.minimum:.4f}", f"{cell.maximum:.4f}",
            "-" if cell.lowest is None else f"{cell.lowest:.4f}", difference or "-")


def sweep_table(config: SweepConfig, cells: Sequence[Cell]) -> Table:
    """For the terminal."""
    table = Table(title=f"sweep {config.name}; differences from {config.compared_with}, paired by seed",
                  title_justify="left")
    for name in _HEADER:
        table.add_column(name, justify="right" if name in _HEADER[2:] else "left")
    for cell in cells:
        table.add_row(*_texts(cell))
    return table


def write_sweep(folder: Path, config: SweepConfig, cells: Sequence[Cell], states: dict[str, str]) -> None:
    """`sweep.json` and `sweep.md` in the folder of the sweep; `states` tells how each run ended, by name."""
    document: dict[str, Any] = {"sweep": config.model_dump(mode="json"), "reference": config.compared_with,
                                "runs": states, "cells": [asdict(cell) for cell in cells]}
    write_json_atomic(folder / "sweep.json", document)
    lines = [f"# {config.name}", "", f"Figures of the {config.at} evaluation; lowest bound is the lowest lower end of "
             f"the runs' own 95% intervals; differences from `{config.compared_with}` are paired by seed, with 95% "
             "intervals of Student's t.", "",
             "| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    lines += ["| " + " | ".join(_texts(cell)) + " |" for cell in cells]
    unfinished = [f"- {name}: {state}" for name, state in states.items() if state != "done"]
    lines += ["", "Not finished:", "", *unfinished] if unfinished else []
    write_text_atomic(folder / "sweep.md", "\n".join(lines) + "\n")
