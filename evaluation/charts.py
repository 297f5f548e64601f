"""Line charts, bars and dot plots as inline SVG: pure functions from numbers to text.

Colours are CSS classes (`s0`, `s1`, ...), so one drawing serves light, dark and paper. Each line chart carries its
numbers in a data attribute for the read-out under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 38
_MAX_POINTS = 500


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Which of the page's series colours, 0 to 6."""
    style: Literal["line", "faint", "points"] = "line"


@dataclass(frozen=True, slots=True)
class Rule:
    """A labelled horizontal line, for what a curve is to be compared with."""

    label: str
    y: float


@dataclass(frozen=True, slots=True)
class LineChart:
    """What a line chart shows."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    rules: Sequence[Rule] = field(default_factory=tuple)
    log_y: bool = False
    from_zero: bool = False
    width: int = WIDTH


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    found = []
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([round(i * step, 12) for i in range(first, last + 1)])
    return min(found, key=lambda ticks: abs(len(ticks) - count))


def short_number(value: float) -> str:
    """`1.5k`, `2.06M`, `0.0003`: at most four significant digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "–"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    text = f"{value:.4g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of up to `width` values, shorter at the ends; gaps (NaN) are left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    half = max(0, width // 2)
    places = np.arange(values.size)
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, values.size)
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, limit: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `limit` points that keep every bucket's lowest and highest value, in order of x."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if x.size <= limit:
        return x, y
    edges = np.linspace(0, x.size, limit // 2 + 1).astype(int)
    chosen = {0, x.size - 1}
    for low, high in pairwise(edges.tolist()):
        if high > low:
            chosen |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
    index = np.array(sorted(chosen))
    return x[index], y[index]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Data coordinates to drawing coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float
    log_y: bool
    width: int

    def px(self, x: float) -> float:
        share = (x - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        low, high, y = (math.log10(v) for v in (self.y0, self.y1, y)) if self.log_y else (self.y0, self.y1, y)
        share = (y - low) / (high - low) if high > low else 0.5
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def y_ticks(self) -> list[float]:
        if not self.log_y:
            return nice_ticks(self.y0, self.y1)
        powers = range(math.ceil(math.log10(self.y0) - 1e-9), math.floor(math.log10(self.y1) + 1e-9) + 1)
        ticks = [10.0**p for p in powers]
        return ticks if len(ticks) >= 3 else [m * 10.0**p for p in range(powers.start - 1, powers.stop + 1)
                                              for m in (1, 2, 5) if self.y0 <= m * 10.0**p <= self.y1]


def line_chart(chart: LineChart) -> str:
    """The chart as one `<figure>`; a plain sentence where there is nothing to draw."""
    drawn = []
    for s in chart.series:
        x, y = thin(np.asarray(s.x, float), np.asarray(s.y, float))
        if chart.log_y:
            x, y = x[y > 0], y[y > 0]
        if x.size:
            drawn.append((s, x, y))
    unit = f" <small>{escape(chart.y_label)}</small>" if chart.y_label else ""
    title = f"<figcaption>{escape(chart.title)}{unit}</figcaption>"
    if not drawn:
        return f'<figure class="chart">{title}<p class="empty">Nothing was recorded.</p></figure>'
    frame = _frame(chart, drawn)
    body = [_axes(frame, chart)]
    body += [_rules(frame, chart.rules)] if chart.rules else []
    body += [_mark(frame, s, x, y) for s, x, y in drawn]
    keys = [(s.label, s.colour, s.style) for s, _, _ in drawn if s.style != "faint"]
    legend = "".join(f'<span class="key s{c} {style}">{escape(label)}</span>' for label, c, style in keys
                     if len(keys) > 1)
    data = {"x": chart.x_label, "box": [_LEFT, chart.width - _RIGHT, _TOP, HEIGHT - _BOTTOM],
            "range": [frame.x0, frame.x1],
            "series": [{"label": s.label, "c": s.colour, "x": [_rounded(v) for v in x], "y": [_rounded(v) for v in y],
                        "py": [round(frame.py(float(v)), 1) for v in y]} for s, x, y in drawn if s.style != "faint"]}
    return (f'<figure class="chart">{title}<div class="legend">{legend}<output></output></div>'
            f'<svg viewBox="0 0 {chart.width} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" '
            f"data-chart='{escape(json.dumps(data, separators=(',', ':')))}'>{''.join(body)}</svg></figure>")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _frame(chart: LineChart, drawn: list[tuple[Series, np.ndarray, np.ndarray]]) -> _Frame:
    x = np.concatenate([x for _, x, _ in drawn])
    y = np.concatenate([y for _, _, y in drawn] + [np.array([r.y for r in chart.rules])])
    y0, y1 = float(y.min()), float(y.max())
    if chart.log_y:
        y0, y1 = (y0 / 1.15, y1 * 1.15)
    else:
        if chart.from_zero:
            y0, y1 = min(0.0, y0), max(0.0, y1)
        pad = (y1 - y0) * 0.05 or abs(y1) * 0.05 or 1.0
        y0, y1 = (y0 if chart.from_zero and y0 == 0 else y0 - pad), y1 + pad
    return _Frame(float(x.min()), float(x.max()), y0, y1, chart.log_y, chart.width)


def _axes(frame: _Frame, chart: LineChart) -> str:
    right, bottom = frame.width - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in frame.y_ticks():
        y = frame.py(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     + _tick(_LEFT - 8, y + 4, "end", tick))
    for tick in nice_ticks(frame.x0, frame.x1, 6):
        x = frame.px(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                     + _tick(x, bottom + 17, "middle", tick))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
                 f'<text class="label" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(chart.x_label)}</text>')
    return "".join(parts)


def _tick(x: float, y: float, anchor: str, value: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{short_number(value)}</text>'


def _rules(frame: _Frame, rules: Sequence[Rule]) -> str:
    """Dashed lines. Labels stand at the left, where a falling curve leaves room; one too near the last goes below."""
    parts: list[str] = []
    floor = -math.inf
    for rule in sorted(rules, key=lambda r: -r.y):
        y = frame.py(rule.y)
        text_y = y - 4 if y - 4 >= floor + 13 else max(y + 13, floor + 13)
        floor = text_y
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="rule" x="{_LEFT + 8}" y="{text_y:.1f}">{escape(rule.label)} {rule.y:.3f}</text>')
    return "".join(parts)


def _mark(frame: _Frame, series: Series, x: np.ndarray, y: np.ndarray) -> str:
    points = [f"{frame.px(float(a)):.1f},{frame.py(float(b)):.1f}" for a, b in zip(x, y, strict=True)]
    line = f'<polyline class="s{series.colour} {series.style}" points="{" ".join(points)}"/>' if len(points) > 1 else ""
    if series.style == "points" or len(points) == 1:
        line += "".join(f'<circle class="s{series.colour}" r="3.2" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}"/>'
                        for p in points)
    return line


def stacked_bar(parts: Sequence[tuple[str, float, int]]) -> str:
    """One bar of (name, amount, colour), with a key that names each part and its percentage."""
    total = sum(amount for _, amount, _ in parts)
    if total <= 0:
        return '<p class="empty">Nothing was recorded.</p>'
    bars, keys, start = [], [], 0.0
    for name, amount, colour in parts:
        wide = amount / total
        bars.append(f'<rect class="s{colour}" x="{start * 1000:.2f}" y="0" width="{max(0.0, wide * 1000 - 1.5):.2f}" '
                    f'height="34"><title>{escape(name)} {wide:.1%}</title></rect>')
        keys.append(f'<span class="key bar s{colour}">{escape(name)} <b>{wide:.1%}</b></span>')
        start += wide
    return (f'<svg class="bar" viewBox="0 0 1000 34" preserveAspectRatio="none" role="img" '
            f'aria-label="time shares">{"".join(bars)}</svg><div class="legend">{"".join(keys)}</div>')


@dataclass(frozen=True, slots=True)
class Dot:
    """One row of a dot plot."""

    label: str
    value: float
    ci: tuple[float, float] | None = None
    ours: bool = False


def dot_plot(dots: Sequence[Dot], x_label: str) -> str:
    """Values on one common axis, best first, intervals as bars; the model's own row stands out."""
    rows = sorted((d for d in dots if math.isfinite(d.value)), key=lambda d: d.value)
    if not rows:
        return ""
    ends = [e for d in rows for e in (d.value, *(d.ci or ()))]
    pad = (max(ends) - min(ends)) * 0.08 or 0.1
    low, high = min(ends) - pad, max(ends) + pad
    width, left, row_height = 460, 158, 40
    right, height = width - 54, len(rows) * row_height + 40

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [f'<line class="grid" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="4" y2="{height - 32}"/>'
             + _tick(px(t), height - 18, "middle", t) for t in nice_ticks(low, high)]
    for i, dot in enumerate(rows):
        y = i * row_height + 18
        kind = "ours" if dot.ours else "other"
        ci = f'<line class="ci {kind}" x1="{px(dot.ci[0]):.1f}" x2="{px(dot.ci[1]):.1f}" y1="{y}" y2="{y}"/>' \
            if dot.ci else ""
        label = escape(dot.label)
        parts.append(f'<text class="row {kind}" x="{left - 12}" y="{y + 4}" text-anchor="end">{label}</text>'
                     f'<line class="stem {kind}" x1="{left}" x2="{px(dot.value):.1f}" y1="{y}" y2="{y}"/>{ci}'
                     f'<circle class="dot {kind}" r="5" cx="{px(dot.value):.1f}" cy="{y}"/>'
                     f'<text class="value {kind}" x="{right + 12}" y="{y + 4}">{dot.value:.3f}</text>')
    parts.append(f'<text class="label" x="{right}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(x_label)}">{"".join(parts)}</svg>'
