"""Memory and profiler."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.monitor.memory import current_rss, peak_device_memory, peak_rss, reset_peak_rss
from pretrain.monitor.profiler import StepProfiler

MB = 1 << 20


def test_peak_memory_rises_with_use_and_can_be_reset():
    reset = reset_peak_rss()
    before = peak_rss()
    block = bytearray(b"x" * (120 * MB))
    assert peak_rss() - before > 100 * MB
    del block
    assert peak_rss() - before > 100 * MB  # a peak stays
    if not reset:
        pytest.skip("this system does not let a process reset its peak")
    assert reset_peak_rss()
    assert peak_rss() - before < 60 * MB
    assert abs(peak_rss() - current_rss()) < 30 * MB


def test_a_cpu_has_no_device_memory():
    assert peak_device_memory(torch.device("cpu")) is None


def _traced(folder) -> dict[str, set[str]]:
    """Names of updates in each trace file."""
    return {path.name: {event["name"] for event in json.loads(path.read_text())["traceEvents"]
                        if str(event.get("name", "")).startswith("update")} for path in folder.iterdir()}


@pytest.mark.parametrize("start, name, steps", [(1, "steps-3-4.rank1.json", {"update3", "update4"}),
                                                (4, "steps-4-4.rank1.json", {"update4"})])
def test_the_trace_holds_exactly_the_steps_asked_for(tmp_path, start, name, steps):
    profiler = StepProfiler(tmp_path / "profile", 3, 4, rank=1)
    for step in range(start, 8):
        profiler.before_step(step)
        with torch.profiler.record_function(f"update{step}"):
            torch.ones(2).sum()
    profiler.close()
    assert _traced(tmp_path / "profile") == {name: steps}


def test_a_run_that_ends_inside_the_window_leaves_what_it_has(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", 1, 100, rank=0)
    profiler.before_step(1)
    with torch.profiler.record_function("update1"):
        torch.ones(2).sum()
    profiler.close()
    profiler.close()
    assert list(_traced(tmp_path / "profile").values()) == [{"update1"}]
