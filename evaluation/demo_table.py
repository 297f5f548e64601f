"""The last words of the demo: what was prepared and trained, how good it is beside n-grams, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from data_prep.manifest import Manifest
from evaluation.comparison import beats, comparison
from evaluation.report_data import ReportData, collect
from evaluation.results import Results
from evaluation.tables import comparison_table, with_interval
from pretrain.config.load import load_run_config
from pretrain.config.source import ShardsConfig
from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """The table to print, and the verdict."""

    table: Table
    passed: bool
    """False only where the model loses to the bigram at equal training tokens."""
    message: str


def demo_outcome(run: Path, export: Path) -> DemoOutcome:
    """Read a finished demo: its run folder, evaluated with baselines, and its export.

    Raises UserError where the run has not been evaluated with n-gram baselines.
    """
    folder = RunFolder.open(run)
    data = collect(folder)
    results = data.main_result()
    better = beats(results) if results is not None else None
    if results is None or better is None:
        raise UserError(f"{run}: has not been evaluated beside a bigram at equal tokens; "
                        f"run `pretrain eval {run} --baselines` first")
    ours, theirs = results.metrics["val/loss"].value, _bigram(results)
    message = (f"the model {'beats' if better else 'loses to'} the bigram at equal training tokens: {ours:.3f} against "
               f"{theirs:.3f} nats a token")
    return DemoOutcome(_table(folder, data, results, export), better, message)


def _bigram(results: Results) -> float:
    return next(row.loss.value for row in comparison(results) if row.label == "bigram, equal tokens")


def _table(folder: RunFolder, data: ReportData, results: Results, export: Path) -> Table:
    """One table of three parts: what was done, how good it is, where it lies."""
    facts, places = Table.grid(padding=(0, 3)), Table.grid(padding=(0, 3))
    source = load_run_config(folder.config_file).config.data.source
    if isinstance(source, ShardsConfig):
        splits = Manifest.read(Path(source.path)).splits
        facts.add_row("tokens prepared", ", ".join(f"{name} {split.tokens:,}" for name, split in splits.items()))
    facts.add_row("parameters", f"{results.model['parameters']:,}")
    speed = data.column("tokens_per_second")[1]
    if speed:
        facts.add_row("tokens a second", f"{float(np.median(speed)):,.0f} (median)")
    for label, key, digits in (("validation loss", "val/loss", 3), ("perplexity", "val/perplexity", 2),
                               ("bits per byte", "val/bits_per_byte", 3)):
        metric = results.metrics.get(key)
        facts.add_row(label, with_interval(metric, digits) + (f", n = {metric.n:,}" if metric else ""))
    checkpoints = folder.checkpoints()
    places.add_column()
    places.add_column(overflow="fold")
    for label, path in (("report", folder.report_file), ("checkpoint", checkpoints[0].path if checkpoints else "-"),
                        ("export", export)):
        places.add_row(label, str(path))
    table = Table(title=f"demo: {data.name}", title_justify="left", show_header=False)
    for part in (facts, comparison_table(results, SIMPLE_HEAD), places):
        table.add_row(part)
        table.add_section()
    return table
