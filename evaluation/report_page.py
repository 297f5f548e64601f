"""The report as one HTML page: style, script and drawings are inside, nothing is fetched, every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from evaluation.charts import (
    Dot,
    LineChart,
    Rule,
    Series,
    dot_plot,
    line_chart,
    running_mean,
    short_number,
    stacked_bar,
)
from evaluation.comparison import Row, comparison
from evaluation.needle_tables import needle_section
from evaluation.report_data import ReportData
from evaluation.results import MetricRecord, Results, TextSample
from pretrain.monitor.clock import PHASES

TIME = "time/"


def page(data: ReportData, created: str) -> str:
    """The whole document."""
    main = data.main_result()
    rows = comparison(main) if main else []
    environment = [(key, _line(value)) for key, value in data.environment.items() if value]
    sections = [_head(data, main), _results(rows, main), needle_section(data.results), _training(data, rows),
                _time(data), _samples(data), _events(data), _facts("Environment", environment),
                _config(data.config_text)]
    assets = files("evaluation").joinpath("assets")
    style = assets.joinpath("report.css").read_text("utf-8")
    script = assets.joinpath("report.js").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(data.name)} – training report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(s for s in sections if s)
            + f"\n<footer>Written {escape(created)} from the run folder alone.</footer>\n</main>\n"
              f"<script>\n{script}</script>\n</body>\n</html>\n")


def trained_tokens(data: ReportData) -> int | None:
    """Tokens the model has been trained on, as the last row states."""
    tokens = data.column("tokens")[1]
    return int(tokens[-1]) if tokens else None


def _head(data: ReportData, main: Results | None) -> str:
    status = data.status
    kind, word = "open", "no status"
    if status is not None:
        kind = {"done": "good", "running": "open", "stopped": "open", "interrupted": "open"}.get(status.state, "bad")
        word = status.state
    model = data.config.get("model", {})
    facts = [str(model.get("family", "")), main and f"step {main.step}", status and status.reason]
    subtitle = " · ".join(str(f) for f in facts if f)
    figures = []
    names = {"val/loss": ("validation loss", 3), "val/perplexity": ("perplexity", 2),
             "val/bits_per_byte": ("bits per byte", 3)}
    for key, (label, digits) in names.items():
        found = data.headline(key)
        if found is not None:
            value, ci = found
            spread = f"95%: {ci[0]:.{digits}f} – {ci[1]:.{digits}f}" if ci else ""
            figures.append(_figure(label, f"{value:.{digits}f}", spread))
    if main and "parameters" in main.model:
        figures.append(_figure("parameters", short_number(main.model["parameters"]), ""))
    tokens, speed = trained_tokens(data), data.column("tokens_per_second")[1]
    if tokens:
        figures.append(_figure("tokens seen", short_number(tokens), f"{int(data.column('step')[1][-1]):,} steps"))
    if speed:
        figures.append(_figure("tokens / s", short_number(float(np.median(speed))), "median of the run"))
    message = f'<p class="note">{escape(status.message)}</p>' if status and status.message else ""
    return (f'<header><h1>{escape(data.name)}<span class="badge {kind}">{escape(word)}</span></h1>'
            f'<p class="sub">{escape(subtitle)}</p>{message}'
            + (f'<dl class="figures">{"".join(figures)}</dl>' if figures else "") + "</header>")


def _figure(label: str, value: str, more: str) -> str:
    return f'<div><dt>{escape(label)}</dt><dd>{escape(value)}<span class="more">{escape(more)}</span></dd></div>'


def _results(rows: Sequence[Row], main: Results | None) -> str:
    if not rows or main is None:
        return ""
    body = []
    for row in rows:
        tokens = "" if row.train_tokens is None else f"{row.train_tokens:,}"
        cells = [_cell(row.loss, 3), _cell(row.perplexity, 2), _cell(row.bits_per_byte, 3)]
        body.append(f'<tr{" class=ours" if row.ours else ""}><td>{escape(row.label)}</td><td>{tokens}</td>'
                    + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    dots = [Dot(r.label, r.loss.value, r.loss.ci, r.ours) for r in rows]
    plot = f'<div class="card"><h3>Loss <small>nats a token</small></h3>{dot_plot(dots, "lower is better")}</div>' \
        if len(rows) > 1 else ""
    n = rows[0].loss.n
    data = main.dataset
    note = (f"Split {data.get('split', '?')}, {n:,} labelled tokens, the same for every row; dtype {main.dtype}. "
            "Intervals are 95%, bootstrapped over whole batches of windows. "
            + ("N-grams: interpolated modified Kneser-Ney, no context across documents or windows." if main.baselines
               else ""))
    head = ("<th></th><th>trained on<br>tokens</th><th>loss<br>nats/token</th><th>perplexity</th>"
            "<th>bits<br>per byte</th>")
    return (f'<section><h2>Results</h2><div class="grid{" results" if plot else ""}">'
            f'<div class="card scroll{"" if plot else " wide"}"><table><thead><tr>{head}</tr></thead>'
            f'<tbody>{"".join(body)}</tbody></table></div>{plot}</div><p class="note">{escape(note)}</p></section>')


def _cell(metric: MetricRecord | None, digits: int) -> str:
    if metric is None:
        return "–"
    ci = f'<span class="ci">{metric.ci[0]:.{digits}f} – {metric.ci[1]:.{digits}f}</span>' if metric.ci else ""
    return f"{metric.value:.{digits}f}{ci}"


def _training(data: ReportData, rows: Sequence[Row]) -> str:
    if not data.rows:
        return '<section><h2>Training</h2><p class="empty">The run has written no metrics yet.</p></section>'
    steps, loss = data.column("loss")
    smooth = running_mean(np.asarray(loss), max(3, len(loss) // 40)).tolist()
    rules = [Rule(r.label.replace(", equal tokens", ""), r.loss.value) for r in rows
             if not r.ours and "equal tokens" in r.label]
    if loss and rules:
        # A rule far above what the model reached would flatten the curve.
        top = max(loss)
        rules = [r for r in rules if r.y <= top]
    val_steps, val = data.column("val/loss")
    charts = [LineChart("Loss", "step", "nats a token", [
        Series("train", steps, loss, 0, "faint"), Series("train, smoothed", steps, smooth, 0),
        Series("validation", val_steps, val, 1, "points")], rules, width=1020)]
    charts += [_single(data, "lr", "Learning rate", "", 2, from_zero=True),
               _single(data, "grad_norm", "Gradient norm before clipping", "", 3, log=True),
               _single(data, "tokens_per_second", "Throughput", "tokens / s", 0, from_zero=True),
               _validation_detail(data)]
    drawn = [line_chart(c) for c in charts]
    drawn[0] = drawn[0].replace('class="chart"', 'class="chart wide"', 1)
    return f'<section><h2>Training</h2><div class="grid">{"".join(drawn)}</div></section>'


def _single(data: ReportData, key: str, title: str, unit: str, colour: int, *, log: bool = False,
            from_zero: bool = False) -> LineChart:
    steps, values = data.column(key)
    spread = max(values) / min(values) if values and min(values) > 0 else 1.0
    return LineChart(title, "step", unit, [Series(key, steps, values, colour)], log_y=log and spread > 20,
                     from_zero=from_zero)


def _validation_detail(data: ReportData) -> LineChart:
    """Bits per byte where they were measured, else accuracy."""
    key, title = ("val/bits_per_byte", "Validation, bits per byte") if data.column("val/bits_per_byte")[0] else (
        "val/accuracy", "Validation, share of tokens guessed first")
    steps, values = data.column(key)
    return LineChart(title, "step", "", [Series(key, steps, values, 1, "points")])


def time_shares(data: ReportData) -> dict[str, float]:
    """Share of wall time by phase of the loop, over all rows, the largest first."""
    seconds = {phase: sum(data.column(TIME + phase)[1]) for phase in PHASES}
    total = sum(seconds.values())
    return {phase: s / total for phase, s in sorted(seconds.items(), key=lambda item: -item[1]) if s > 0}


def _time(data: ReportData) -> str:
    shares = [(phase, share, PHASES.index(phase)) for phase, share in time_shares(data).items()]
    if not shares:
        return ""
    return ('<section><h2>Where the time went <small>share of wall time over the whole run</small></h2>'
            f'<div class="card">{stacked_bar(shares)}</div></section>')


def _samples(data: ReportData) -> str:
    texts: list[tuple[Results, TextSample]] = [(r, s) for r in data.results for s in r.samples]
    if not texts:
        return ""
    newest = max(r.step or 0 for r, _ in texts)
    cards = [f'<div class="card"><p class="sample"><span class="prompt">{escape(s.prompt)}</span>{escape(s.text)}</p>'
             "</div>" for r, s in texts if (r.step or 0) == newest]
    return (f'<section><h2>Samples <small>step {newest}; the prompt is grey, the text after it is the model’s, '
            f'not selected</small></h2><div class="grid">{"".join(cards)}</div></section>')


def _events(data: ReportData) -> str:
    rows = [(f"start {s.fence}", f"{s.when} on {s.host}, "
             + ("fresh" if s.resumed_step is None else f"went on from step {s.resumed_step}")) for s in data.starts]
    skipped = "none" if not data.skipped else f"{len(data.skipped)} not finite, batches " + ", ".join(
        map(str, data.skipped[:40])) + (" ..." if len(data.skipped) > 40 else "")
    rows.append(("skipped updates", skipped))
    if data.checkpoints:
        rows.append(("checkpoints", ", ".join(data.checkpoints[:12]) + (" ..." if len(data.checkpoints) > 12 else "")))
    return _facts("Starts, skipped updates, checkpoints", rows)


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    if not body:
        return ""
    return (f'<section><h2>{escape(title)}</h2><div class="card scroll"><table class="facts"><tbody>{body}</tbody>'
            "</table></div></section>")


def _line(value: Any) -> str:
    """Nested JSON as one line: `torch 2.13.0, numpy 2.4.6`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) if all(isinstance(v, str) for v in value) else "; ".join(map(_line, value))
    return "–" if value is None else str(value)


def _config(text: str) -> str:
    if not text:
        return ""
    return (f'<section><h2>Config</h2><details><summary>config.yaml, {len(text.splitlines())} lines</summary>'
            f'<pre class="config">{escape(text)}</pre></details></section>')
