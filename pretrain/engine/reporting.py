"""What a run says about itself: rows of metrics, progress, status."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from pretrain.config.interval import Progress
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import Metric
from pretrain.engine.state import Rewind, RunState
from pretrain.engine.update import Sums, Update
from pretrain.monitor.clock import TimeShares
from pretrain.monitor.memory import peak_device_memory, peak_rss
from pretrain.monitor.progress import Progress as ProgressDisplay
from pretrain.monitor.rows import REWIND
from pretrain.monitor.throughput import Throughput
from pretrain.monitor.writers import MetricsWriter
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status

_STATUS_SECONDS = 5.0
_log = logging.getLogger("pretrain")


@dataclass
class Reporter:
    """Collects sums on the device and reduces them over ranks only when a row is written."""

    world: World
    folder: RunFolder
    clock: TimeShares
    throughput: Throughput
    writer: MetricsWriter | None
    """Rank 0's."""
    progress: ProgressDisplay | None
    """Rank 0's."""
    status: Status | None
    """Rank 0's."""
    diagnose: Callable[[Mapping[str, float]], None] = field(default=lambda row: None)
    reason: str = ""
    _sums: Sums = field(default_factory=dict)
    _grad_norm: float = math.nan
    _lr: float = 0.0
    _status_written: float = 0.0

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Time that is no training: evaluations and saves."""
        with self.throughput.excluded(), self.clock.phase(phase):
            yield

    def add(self, update: Update, lr: float, step: int, tokens: int) -> None:
        """Take in one update of `tokens` tokens; its sums stay on the device. A skipped one has none worth adding."""
        for name, (total, count) in update.metrics.items() if update.outcome.applied else ():
            if name in self._sums:
                total, count = total + self._sums[name][0], count + self._sums[name][1]
            self._sums[name] = (total, count)
        self._grad_norm = update.outcome.grad_norm
        self._lr = lr
        self.throughput.update(step, tokens)

    def log(self, state: RunState, progress: Progress, skipped: int, notice: str = "") -> None:
        """Write a row. Collective: sums are reduced over ranks here. `notice` goes to the status."""
        means = self._reduce()
        shares = self.clock.take()
        if self.writer is None:
            return
        rates = self.throughput.read()
        memory = peak_device_memory(self.world.device)
        row: dict[str, float | int | str | None] = {
            "step": state.step, "k": state.k, "tokens": progress.tokens, "loss": means.pop("loss", None),
            "lr": self._lr, "grad_norm": self._grad_norm, "tokens_per_second": rates.tokens_per_second,
            "mfu": rates.mfu,
            "eta_seconds": rates.eta_seconds, "skipped": skipped, "rss_gb": peak_rss() / 1e9,
            "device_memory_gb": memory / 1e9 if memory is not None else None,
            **means, **{f"time/{name}": seconds for name, seconds in shares.items()},
        }
        self.writer.write(row)
        if self.progress is not None:
            self.progress.update(row)
        self.diagnose({k: v for k, v in row.items() if isinstance(v, (int, float))})
        self.write_status(state, notice)

    def start(self, figures: Mapping[str, float]) -> None:
        """Write the row of what was found before the first update, where there is something."""
        if self.writer is not None and figures:
            self.writer.write({"step": 0, "k": 0, "tokens": 0, **figures})

    def evaluation(self, state: RunState, progress: Progress, results: Mapping[str, Metric]) -> None:
        """Write a row of an evaluation."""
        if self.writer is None or not results:
            return
        row: dict[str, float | int | str | None] = {"step": state.step, "k": state.k, "tokens": progress.tokens}
        for name, metric in results.items():
            row[name] = metric.value
            if metric.ci is not None:
                row[f"{name}/low"], row[f"{name}/high"] = metric.ci
        self.writer.write(row)
        self.diagnose({key: value for key, value in row.items() if isinstance(value, (int, float))})
        _log.info("step %d: %s", state.step, ", ".join(f"{name} {m.value:.4f}" for name, m in results.items()))

    def rewound(self, state: RunState, progress: Progress, rewind: Rewind) -> None:
        """Write the row that takes the record back to `state`, and the status. What was summed up since is dropped."""
        self._sums = {}
        if self.writer is not None:
            self.writer.write({"step": state.step, "k": state.k, "tokens": progress.tokens,
                               REWIND: len(state.rewinds), "rewind/step": rewind["step"], "rewind/batch": rewind["k"],
                               "rewind/loss": rewind["loss"]})
        self._status_written = -math.inf
        self.write_status(state)

    def write_status(self, state: RunState, notice: str = "") -> None:
        """Bring status.json up to date; at most every few seconds, because it is flushed to the disk."""
        if self.status is not None and time.monotonic() - self._status_written > _STATUS_SECONDS:
            self._status_written = time.monotonic()
            status = replace(self.status, step=state.step, k=state.k, rewinds=len(state.rewinds),
                                  message=notice)
            try:
                self.status = status.write(self.folder)
            except OSError as error:
                _log.warning("%s: not written (%s)", self.folder.status_file, error.strerror)

    def _reduce(self) -> dict[str, float]:
        """Means over the updates since the last row and over ranks."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        flat = torch.stack([value for name in names for value in self._sums[name]])
        self._sums = {}
        if self.world.size > 1:
            dist.all_reduce(flat)
        values = flat.tolist()
        pairs = zip(names, values[0::2], values[1::2], strict=True)
        return {name: total / count if count else math.nan for name, total, count in pairs}
