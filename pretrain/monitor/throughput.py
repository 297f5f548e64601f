"""Tokens a second, model FLOPs utilisation and time to go."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a run goes."""

    tokens_per_second: float
    """Over the newest updates, all ranks together, without evaluations and saves."""
    smoothed_tokens_per_second: float
    """Exponential moving average of the same over updates."""
    mfu: float | None
    """Share of the devices' peak that the model's own arithmetic uses; None where no peak is known."""
    eta_seconds: float
    """Time to the last step, evaluations and saves included as far as there were any."""


class Throughput:
    """Counts tokens over time. Fed once per update; evaluation and saving are excluded from the rate."""

    def __init__(self, *, total_steps: int, flops_per_token: float, peak_flops: float | None, devices: int,
                 window: int = 20, smoothing: float = 0.05, timer: Callable[[], float] = time.perf_counter) -> None:
        """`flops_per_token`: forward pass; `peak_flops`: FLOP/s of one device; `window`: updates; `timer`: seconds.

        Construct it right before the first update: that is where its time starts.
        """
        self._total_steps = total_steps
        self._flops = 3.0 * flops_per_token
        self._peak = peak_flops * devices if peak_flops else None
        self._smoothing = smoothing
        self._timer = timer
        self._start = timer()
        self._excluded = 0.0
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=window + 1)
        self._smoothed = 0.0
        self._steps = 0
        self._step = 0

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time that is no training: evaluations and saves."""
        before = self._timer()
        try:
            yield
        finally:
            self._excluded += self._timer() - before

    def update(self, step: int, tokens: int) -> None:
        """One update that brought the run to `step` has consumed `tokens` over all ranks."""
        active = self._timer() - self._start - self._excluded
        seconds, total = self._samples[-1]
        self._samples.append((active, total + tokens))
        self._steps += 1
        self._step = step
        rate = tokens / max(active - seconds, 1e-9)
        # The weight starts at one and settles: the first updates count as a plain mean, not as a pull from zero.
        weight = max(self._smoothing, 1.0 / self._steps)
        self._smoothed += weight * (rate - self._smoothed)

    def read(self) -> Rates:
        """Rates as of the last update."""
        (first, tokens_before), (last, tokens_now) = self._samples[0], self._samples[-1]
        rate = (tokens_now - tokens_before) / max(last - first, 1e-9)
        per_step = (last - first) / max(1, len(self._samples) - 1)
        overhead = (last + self._excluded) / max(last, 1e-9)
        return Rates(rate, self._smoothed, self._flops * rate / self._peak if self._peak else None,
                     max(0, self._total_steps - self._step) * per_step * overhead)


@dataclass(frozen=True, slots=True)
class _Peak:
    """Dense peaks of one device in TFLOP/s, without structured sparsity."""

    names: tuple[str, ...]
    """Words that must all be in the name that the driver reports."""
    half: float
    """bf16 and fp16 with fp32 accumulation."""
    tf32: float
    fp32: float


# The first match counts, so the special forms of a device stand before the general one. Vendors print the tensor-core
# figures with 2:4 sparsity from Hopper on; half of that stands here.
_PEAKS = (
    _Peak(("GB200",), 2500.0, 1250.0, 80.0),  # NVIDIA GB200 NVL72 specifications: 5 / 2.5 PFLOPS sparse, 80 TFLOPS
    _Peak(("B200",), 2250.0, 1100.0, 75.0),  # NVIDIA HGX B200 specifications: 4.5 / 2.2 PFLOPS sparse, 75 TFLOPS
    _Peak(("H200", "NVL"), 835.5, 417.5, 60.0),  # NVIDIA H200 data sheet, NVL: 1671 / 835 TFLOPS sparse, 60
    _Peak(("H200",), 989.5, 494.5, 67.0),  # NVIDIA H200 data sheet, SXM: 1979 / 989 TFLOPS sparse, 67
    _Peak(("H100", "NVL"), 835.5, 417.5, 60.0),  # NVIDIA H100 data sheet, NVL: 1671 / 835 TFLOPS sparse, 60
    _Peak(("H100", "PCIe"), 756.5, 378.0, 51.0),  # NVIDIA H100 data sheet, PCIe: 1513 / 756 TFLOPS sparse, 51
    _Peak(("H100",), 989.5, 494.5, 67.0),  # NVIDIA H100 data sheet, SXM: 1979 / 989 TFLOPS sparse, 67
    _Peak(("A100",), 312.0, 156.0, 19.5),  # NVIDIA A100 data sheet, all forms: 312 / 156 / 19.5 dense
    _Peak(("L40S",), 362.0, 183.0, 91.6),  # NVIDIA L40S data sheet: 362.05 / 183 / 91.6 dense
    _Peak(("MI325X",), 1307.4, 653.7, 163.4),  # AMD Instinct MI325X data sheet: 1307.4 / 653.7 / 163.4 dense
    _Peak(("MI300X",), 1307.4, 653.7, 163.4),  # AMD Instinct MI300X data sheet: 1307.4 / 653.7 / 163.4 dense
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s, or None where it is not known (every CPU).

    `device_name` as the driver reports it ("NVIDIA H100 80GB HBM3"); `dtype` is bf16, fp16, tf32 (fp32 values on
    tensor cores) or fp32. Raises ValueError for another dtype.
    """
    if dtype not in ("bf16", "fp16", "tf32", "fp32"):
        raise ValueError(f'"{dtype}": the dtype is one of bf16, fp16, tf32, fp32')
    words = device_name.lower()
    for peak in _PEAKS:
        if all(name.lower() in words for name in peak.names):
            return {"bf16": peak.half, "fp16": peak.half, "tf32": peak.tf32, "fp32": peak.fp32}[dtype] * 1e12
    return None
