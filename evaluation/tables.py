"""Results as tables for the terminal."""

from __future__ import annotations

from rich.box import HEAVY_HEAD, Box
from rich.table import Table

from evaluation.comparison import comparison
from evaluation.results import MetricRecord, Results


def with_interval(metric: MetricRecord | None, digits: int) -> str:
    """`4.312 (4.280 to 4.345)`."""
    if metric is None:
        return "-"
    ci = f" ({metric.ci[0]:.{digits}f} to {metric.ci[1]:.{digits}f})" if metric.ci else ""
    return f"{metric.value:.{digits}f}{ci}"


def metrics_table(results: Results) -> Table:
    """All metrics of an evaluation with their number of things and 95% interval."""
    table = Table(title=f"{results.task} of {results.target}, {results.dtype}", title_justify="left")
    for name, justify in (("metric", "left"), ("value (95% interval)", "right"), ("n", "right")):
        table.add_column(name, justify=justify, no_wrap=name == "metric")  # type: ignore[arg-type]
    for name, metric in results.metrics.items():
        table.add_row(name, with_interval(metric, 4), f"{metric.n:,}")
    return table


def vectors_table(results: Results) -> Table:
    """Tasks of encoders: one line a head (and dimension, and reference), a column a figure."""
    rows: dict[str, dict[str, MetricRecord]] = {}
    for name, metric in results.metrics.items():
        _, vectors, figure = name.split("/", 2)
        rows.setdefault(vectors, {})[figure] = metric
    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    sizes = "".join(f", {results.dataset[what]:,} {what}" for what in ("pairs", "queries", "passages")
                    if what in results.dataset)
    table = Table(title=f"{results.task} of {results.target} on {results.dataset['path']}{sizes}, {results.dtype}",
                  title_justify="left")
    for name in ("vectors", *figures):
        table.add_column(name, justify="right" if name in figures else "left")
    for vectors, row in rows.items():
        # One interval a line: that of the first figure, by which lines are compared.
        table.add_row(vectors, *(with_interval(row.get(figure), 4) if figure == figures[0] else
                                 "-" if figure not in row else f"{row[figure].value:.4f}" for figure in figures))
    return table


def comparison_table(results: Results, box: Box = HEAVY_HEAD) -> Table:
    """The model beside its n-gram baselines."""
    table = Table(title="beside n-gram baselines on the same tokens", title_justify="left", box=box)
    for name in ("", "trained on", "nats/token", "perplexity", "bits/byte"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in comparison(results):
        tokens = "-" if row.train_tokens is None else f"{row.train_tokens:,}"
        per_byte = "-" if row.bits_per_byte is None else f"{row.bits_per_byte.value:.3f}"
        table.add_row(row.label, tokens, f"{row.loss.value:.3f}", f"{row.perplexity.value:.2f}", per_byte,
                      style="bold" if row.ours else None)
    return table


def details_table(results: Results) -> Table:
    """One line a gate or check: name, verdict, message."""
    table = Table(title=f"{results.task} of {results.target}", title_justify="left")
    for name in ("check", "verdict", "message"):
        table.add_column(name)
    for name, found in results.details.items():
        table.add_row(name, "passed" if found["passed"] else "[bold red]FAILED[/]", found["message"])
    return table
