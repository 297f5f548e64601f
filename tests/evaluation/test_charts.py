"""Drawings: ticks are round and inside, thinning loses no extreme, places are those of the data, text is escaped."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.charts import (
    Dot,
    LineChart,
    Rule,
    Series,
    dot_plot,
    line_chart,
    nice_ticks,
    running_mean,
    short_number,
    stacked_bar,
    thin,
)

cases = settings(deadline=None, derandomize=True, max_examples=150)


@cases
@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e6))
def test_ticks_are_round_inside_and_neither_few_nor_many(low, span):
    ticks = nice_ticks(low, low + span)
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 11
    assert low - 1e-6 * span <= ticks[0] and ticks[-1] <= low + span * (1 + 1e-6)
    digits = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(digits - m) for m in (1, 2, 5)) < 1e-3 and np.allclose(steps, steps[0], rtol=1e-3)


@cases
@given(st.integers(1, 3000), st.integers(0, 1000))
def test_thinning_keeps_extremes_ends_and_order(n, seed):
    y = np.random.default_rng(seed).normal(size=n).cumsum()
    x = np.arange(n, dtype=float)
    tx, ty = thin(x, y, limit=100)
    assert len(tx) <= 104 and (np.diff(tx) > 0).all()
    assert ty.min() == y.min() and ty.max() == y.max() and tx[0] == 0 and tx[-1] == n - 1
    assert (y[tx.astype(int)] == ty).all()


def test_running_mean_equals_a_slow_one():
    y = np.random.default_rng(0).normal(size=50)
    y[[3, 4, 20]] = np.nan
    for width in (1, 4, 9):
        half = width // 2
        expected = [np.nanmean(y[max(0, i - half):i + half + 1]) if np.isfinite(y[max(0, i - half):i + half + 1]).any()
                    else np.nan for i in range(50)]
        np.testing.assert_allclose(running_mean(y, width), expected)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1234, "1.234k"), (2_060_000, "2.06M"), (3e-5, "3e-5"),
                                             (0.25, "0.25"), (-1500, "-1.5k"), (math.inf, "∞"), (math.nan, "–")])
def test_short_numbers(value, text):
    assert short_number(value) == text


def test_points_stand_where_the_axes_say():
    chart = LineChart("t", "step", "", [Series("a", [0, 10], [1.0, 3.0], 0)], [Rule("r", 2.0)], width=640)
    svg = line_chart(chart)
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in
                          re.search(r'polyline class="s0 line" points="([^"]+)"', svg)[1].split()]
    rule = float(re.search(r'line class="rule"[^>]* y1="([\d.]+)"', svg)[1])
    assert x0 == 58 and x1 == 626 and y1 < y0 and rule == pytest.approx((y0 + y1) / 2, abs=0.1)
    data = json.loads(unescape(re.search(r"data-chart='([^']+)'", svg)[1]))
    assert data["range"] == [0, 10] and data["series"][0]["py"] == [y0, y1]


def test_gaps_zeros_and_nothing():
    nan = math.nan
    assert "Nothing was recorded" in line_chart(LineChart("t", "x", "", [Series("a", [], [], 0)]))
    assert "Nothing was recorded" in line_chart(LineChart("t", "x", "", [Series("a", [1], [nan], 0)]))
    log = line_chart(LineChart("t", "x", "", [Series("a", [1, 2, 3], [0.0, 1.0, 100.0], 0)], log_y=True))
    assert "nan" not in log.lower() and log.count(",") > 0
    one = line_chart(LineChart("t", "x", "", [Series("a", [5], [2.0], 0)]))
    assert "<circle" in one and "nan" not in one
    assert "Nothing was recorded" in stacked_bar([]) and dot_plot([Dot("a", nan)], "x") == ""


def test_shares_add_up_and_dots_are_ranked():
    bar = stacked_bar([("forward", 3.0, 1), ("data", 1.0, 0)])
    assert "<b>75.0%</b>" in bar and "<b>25.0%</b>" in bar
    plot = dot_plot([Dot("b", 2.0), Dot("a", 1.0, (0.9, 1.1), ours=True)], "loss")
    assert plot.index(">a<") < plot.index(">b<") and "ci ours" in plot


def test_text_is_escaped():
    evil = "<script>x</script>\"'"
    for svg in (line_chart(LineChart(evil, evil, evil, [Series(evil, [1, 2], [1, 2], 0), Series("b", [1], [1], 1)],
                                     [Rule(evil, 1.5)])),
                dot_plot([Dot(evil, 1.0)], evil), stacked_bar([(evil, 1.0, 0)])):
        assert "<script" not in svg
