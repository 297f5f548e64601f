from __future__ import annotations

import contextlib
import itertools

import pytest

from pretrain.monitor.clock import PHASES, TimeShares
from pretrain.monitor.throughput import Throughput, peak_flops


class Timer:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_is_counted_once_and_sums_to_the_whole():
    timer = Timer()
    shares = TimeShares(timer)
    timer.now += 1
    with shares.phase("forward"):
        timer.now += 2
        with shares.phase("data"):
            timer.now += 4
        timer.now += 8
    with shares.phase("data"):
        timer.now += 16
    timer.now += 32
    taken = shares.take()
    assert taken == {**dict.fromkeys(PHASES, 0.0), "forward": 10, "data": 20, "other": 33}
    assert shares.take() == dict.fromkeys(PHASES, 0.0)


def test_taking_inside_a_phase_and_errors_lose_nothing():
    timer = Timer()
    shares = TimeShares(timer)
    with contextlib.suppress(RuntimeError), shares.phase("eval"):
        timer.now += 1
        assert shares.take()["eval"] == 1
        timer.now += 2
        raise RuntimeError
    timer.now += 4
    assert {name: seconds for name, seconds in shares.take().items() if seconds} == {"eval": 2, "other": 4}
    with pytest.raises(KeyError):
        shares.phase("forwards")


def meter(timer: Timer, **changes) -> Throughput:
    options = {"total_steps": 100, "flops_per_token": 1e9, "peak_flops": 1e12, "devices": 2, "window": 4} | changes
    return Throughput(**options, timer=timer)


def test_rates_at_a_steady_pace():
    timer = Timer()
    rates = meter(timer)
    for step in range(1, 11):
        timer.now += 0.5
        rates.update(step, 50)
        read = rates.read()
        assert read.tokens_per_second == pytest.approx(100)
        assert read.smoothed_tokens_per_second == pytest.approx(100)
        assert read.mfu == pytest.approx(3 * 1e9 * 100 / 2e12)
        assert read.eta_seconds == pytest.approx((100 - step) * 0.5)


def test_evaluation_and_saves_cost_no_rate_but_time_to_go():
    timer = Timer()
    rates = meter(timer)
    for step in range(1, 11):
        timer.now += 0.5
        rates.update(step, 50)
        with rates.excluded():
            timer.now += 0.25
    read = rates.read()
    assert read.tokens_per_second == pytest.approx(100)
    assert read.eta_seconds == pytest.approx(90 * 0.75, rel=0.04)


def test_the_window_forgets_the_slow_start():
    timer = Timer()
    rates = meter(timer, peak_flops=None)
    for step, seconds in zip(itertools.count(1), [60.0, 1, 1, 1, 1, 1], strict=False):
        timer.now += seconds
        rates.update(step, 10)
    assert rates.read().tokens_per_second == pytest.approx(10)
    assert rates.read().mfu is None


def test_the_average_follows_a_change_of_pace():
    timer = Timer()
    rates = meter(timer, smoothing=0.1)
    for step in range(1, 201):
        timer.now += 1.0 if step <= 100 else 0.5
        rates.update(step, 10)
    assert rates.read().smoothed_tokens_per_second == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("name, bf16, tf32, fp32", [
    ("NVIDIA H100 80GB HBM3", 989.5, 494.5, 67), ("NVIDIA H100 PCIe", 756.5, 378, 51),
    ("NVIDIA H100 NVL", 835.5, 417.5, 60), ("NVIDIA H200", 989.5, 494.5, 67), ("NVIDIA H200 NVL", 835.5, 417.5, 60),
    ("NVIDIA GH200 480GB", 989.5, 494.5, 67), ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 156, 19.5), ("NVIDIA L40S", 362, 183, 91.6), ("NVIDIA B200", 2250, 1100, 75),
    ("NVIDIA GB200", 2500, 1250, 80), ("AMD Instinct MI300X", 1307.4, 653.7, 163.4),
])
def test_peaks_are_dense_and_found_by_the_name_of_the_driver(name, bf16, tf32, fp32):
    assert [peak_flops(name, dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")] == \
        pytest.approx([bf16 * 1e12, bf16 * 1e12, tf32 * 1e12, fp32 * 1e12])


def test_no_peak_is_invented():
    for name in ("cpu", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "AMD EPYC 7763", "NVIDIA RTX 9999"):
        assert peak_flops(name, "bf16") is None
    with pytest.raises(ValueError, match="int8"):
        peak_flops("NVIDIA H200", "int8")
