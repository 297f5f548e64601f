"""A needle evaluation as tables, and as a section of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from evaluation.charts import LineChart, Rule, Series, line_chart
from evaluation.needle import TASK
from evaluation.results import Results

_WORD = {True: "as expected", False: "NOT AS EXPECTED", None: ""}


def needle_tables(results: Results) -> Iterator[RenderableType]:
    """Controls, references, checks, distance, findings, verdict: what there is of them."""
    details = results.details
    if details["controls"] or details["references"]:
        yield _control_table(details)
    if details.get("distance"):
        table = Table(title="hit rate by distance from needle to answer", title_justify="left")
        for name in ("tokens", "hit rate (95% interval)", "n"):
            table.add_column(name, justify="right")
        for row in details["distance"]:
            table.add_row(f"{row['low']} to {row['high']}", _rate(row), f"{row['n']:,}")
        yield table
    for check in details.get("checks", ()):
        yield Text(f"{check['name']}: {'passed' if check['passed'] else 'FAILED'}, {check['message']}",
                   style="" if check["passed"] else "bold red")
    gate = details.get("write_gate")
    if gate:
        yield Text(f"write gate: {gate['needle']:.3f} of the needle (least {gate['needle_least']:.3f}), "
                   f"{gate['elsewhere']:.2%} of the rest, {gate['elsewhere_sum']:.1f} tokens of it together; more than "
                   f"half of {gate['elsewhere_open']:.3%} of it")
    for name, value in details.get("perplexity", {}).items():
        yield Text(f"perplexity of {name}: {value:,.2f}")
    for finding in details["findings"]:
        yield Text(finding, style="yellow")
    yield Text(details["verdict"]["words"], style="bold")


def _control_table(details: Mapping[str, Any]) -> Table:
    table = Table(title="controls", title_justify="left")
    for name in ("control", "expected", "hit rate (95% interval)", "any token of the needle", ""):
        table.add_column(name)
    for name, value in details["nulls"]["top_1"].items():
        table.add_row(name, "exact", f"{value:.4%}", "")
    for row in [*details["controls"], *details["references"]]:
        bag = "" if row["bag"] is None else f"{row['bag']:.2%}"
        table.add_row(f"{row['name']}: {row['meaning']}", row["expected"], _rate(row), bag, _WORD[row["passed"]],
                      style="bold red" if row["passed"] is False else None)
    for name, reason in details.get("left_out", {}).items():
        table.add_row(f"{name}: {reason}")
    return table


def _rate(row: Mapping[str, Any]) -> str:
    low, high = row["ci"]
    return f"{row['value']:.2%} ({low:.2%} to {high:.2%})"


def needle_section(results: Sequence[Results]) -> str:
    """The newest needle evaluation of a run as HTML, those with controls first; nothing where there is none."""
    found = [r for r in results if r.task == TASK]
    if not found:
        return ""
    newest = max(found, key=lambda r: (bool(r.details["controls"]), r.step or 0, r.created))
    details = newest.details
    name = newest.prefix
    body = [_cells(key.removeprefix(f"{name}/"), m.value, m.ci, m.n, "") for key, m in newest.metrics.items()
            if "/control/" not in key]
    body += [_cells(f"{r['name']}: {r['meaning']}", r["value"], r["ci"], r["n"],
                    " · ".join(part for part in (r["expected"], _WORD[r["passed"]]) if part))
             for r in [*details["controls"], *details["references"]]]
    body += [_cells(f"null: {key}", value, None, None, "exact") for key, value in details["nulls"]["top_1"].items()]
    texts = [*details["findings"], *(f"{name}: {reason}" for name, reason in details.get("left_out", {}).items())]
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in texts)
    marker = details["task"]["needle_marker"]
    about = f"step {newest.step}, split {name}, {details['examples']} examples, marker {marker}"
    return (f"<section><h2>Needles <small>{escape(about)}</small></h2>"
            f"<p><strong>{escape(details['verdict']['words'])}</strong></p>{notes}"
            f'<div class="card scroll wide"><table><thead><tr><th></th><th>rate</th><th>n</th><th></th></tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{_distance_chart(details)}</section>")


def _cells(label: str, value: float, ci: Sequence[float] | None, n: int | None, note: str) -> str:
    spread = f'<span class="ci">{ci[0]:.4f} – {ci[1]:.4f}</span>' if ci else ""
    count = "" if n is None else f"{n:,}"
    return (f"<tr><td>{escape(label)}</td><td>{value:.4f}{spread}</td><td>{count}</td><td>{escape(note)}</td></tr>")


def _distance_chart(details: Mapping[str, Any]) -> str:
    rows = details.get("distance")
    if not rows:
        return ""
    places = [(row["low"] + row["high"]) / 2 for row in rows]
    series = [Series("hit rate", places, [row["value"] for row in rows], 0, "points"),
              Series("lower bound", places, [row["ci"][0] for row in rows], 1),
              Series("upper bound", places, [row["ci"][1] for row in rows], 2)]
    return line_chart(LineChart("Hit rate by distance", "tokens between needle and answer", "", series,
                                [Rule("knows the set only", details["nulls"]["top_1"]["needle_bag"])], from_zero=True))
