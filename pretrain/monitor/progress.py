"""What a person watching a run sees: a bar on a terminal, else one line per row of metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from pretrain.monitor.rows import Value

log = logging.getLogger("pretrain.train")
Mode = Literal["auto", "bar", "lines", "off"]


class Progress:
    """Shows rows of metrics. The line of each row also goes to the log file, whatever the mode."""

    def __init__(self, mode: Mode, total_steps: int, console: Console) -> None:
        """`console` is the one `setup_logging` returned: the bar and the log then do not cut through each other."""
        if mode == "auto":
            mode = "bar" if console.is_terminal else "lines"
        self._mode = mode
        self._total_steps = total_steps
        self._bar: RichProgress | None = None
        if mode == "bar":
            self._bar = RichProgress(BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[line]}"),
                                     console=console, refresh_per_second=2)
            self._task = self._bar.add_task("", total=total_steps, line="")
            self._bar.start()

    def update(self, row: Mapping[str, Value]) -> None:
        """Show one row: `step`, and of `loss`, `lr`, `tokens_per_second`, `grad_norm`, `skipped`, `eta_seconds` what
        it has.
        """
        step = row.get("step")
        log.info("%s", format_line(row, self._total_steps), extra={"console": self._mode == "lines"})
        if self._bar is not None and isinstance(step, int):
            self._bar.update(self._task, completed=step, line=" | ".join(_parts(row)))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def format_line(row: Mapping[str, Value], total_steps: int) -> str:
    """One line: `step 120/1000 | loss 4.5123 | lr 2.40e-04 | 7,512 tok/s | grad 1.23 | skipped 0 | eta 0:12:31`."""
    return " | ".join([f"step {row.get('step')}/{total_steps}", *_parts(row)])


def _parts(row: Mapping[str, Value]) -> list[str]:
    shapes = (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("tokens_per_second", "{:,.0f} tok/s"),
              ("grad_norm", "grad {:.3g}"), ("skipped", "skipped {:.0f}"))
    parts = [shape.format(row[key]) for key, shape in shapes if isinstance(row.get(key), (int, float))]
    eta = row.get("eta_seconds")
    if isinstance(eta, (int, float)) and math.isfinite(eta):
        minutes, seconds = divmod(round(eta), 60)
        parts.append(f"eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return parts
