"""Requests to stop: signals, the wall clock and control files set flags; ranks agree on them at a step boundary."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from pretrain.errors import ExitCode
from pretrain.runfolder.control import poll
from pretrain.runfolder.layout import RunFolder

SAVE, STOP, EVAL, RELOAD = 1, 2, 4, 8
"""Bits of a request; ranks agree on their union."""
_CONTROL_BITS = {"save": SAVE, "stop": SAVE | STOP, "save_and_stop": SAVE | STOP, "eval": EVAL, "reload_lr": RELOAD}
_POLL_SECONDS = 1.0


class StopRequests:
    """Collects requests of this rank between step boundaries.

    SIGTERM, SIGUSR1 and the first SIGINT ask for a checkpoint and an end with exit code 85; a second SIGINT ends the
    process at once with 130. Handlers only set flags. The wall clock and the control folder are read by rank 0.
    """

    def __init__(self, folder: RunFolder, *, is_main: bool, max_hours: float | None, started: float) -> None:
        self._folder = folder
        self._is_main = is_main
        self._deadline = started + max_hours * 3600 if max_hours else None
        self._bits = 0
        self._interrupts = 0
        self._last_poll = 0.0
        self.reason = ""
        self.control_values: dict[str, str] = {}

    def install(self) -> None:
        """Install the signal handlers."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os.write(sys.stderr.fileno(), b"interrupted twice: leaving without a checkpoint\n")
                os._exit(int(ExitCode.INTERRUPTED))
        self._bits |= SAVE | STOP
        self.reason = self.reason or signal.Signals(number).name

    def take(self, now: float | None = None) -> int:
        """Requests since the last call, as bits."""
        now = time.monotonic() if now is None else now
        if self._is_main and now - self._last_poll >= _POLL_SECONDS:
            self._last_poll = now
            for name, value in poll(self._folder).items():
                self._bits |= _CONTROL_BITS[name]
                self.control_values[name] = value
                self.reason = self.reason or f"control/{name}"
        if self._is_main and self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self._bits |= SAVE | STOP
            self.reason = self.reason or "train.max_hours"
        bits, self._bits = self._bits, 0
        return bits
