"""Requests to stop: signals, the wall clock and control files set flags; ranks agree on them at a step boundary.

Imports no torch: a rank installs its signal handlers before it imports anything that takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from pretrain.errors import ExitCode
from pretrain.runfolder.control import poll
from pretrain.runfolder.layout import RunFolder

SAVE, STOP, EVAL, RELOAD = 1, 2, 4, 8
"""Bits of a request; ranks agree on their union."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CONTROL_BITS = {"save": SAVE, "stop": SAVE | STOP, "save_and_stop": SAVE | STOP, "eval": EVAL, "reload_lr": RELOAD}
_POLL_SECONDS = 1.0
_SHOW_CURSOR = b"\x1b[?25h"


class StopSignals:
    """SIGTERM, SIGUSR1 and SIGINT of this process.

    Before training there is nothing to save, and the first of them ends the process through `leave`. From `hold()` on
    it is kept in `reason` until the next step boundary, where ranks save and end with exit code 85. A second SIGINT
    always ends the process at once with 130.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.reason = ""
        """Name of the first signal; empty where none came."""
        self.leave: Callable[[], None] = self.leave_at_once
        """What ends this process before training. Does not return."""
        self._is_main = is_main
        self._interrupts = 0
        self._holding = False

    @classmethod
    def installed(cls, *, is_main: bool) -> StopSignals:
        """Handlers that answer from now on; our launcher starts ranks with these signals blocked until then."""
        signals = cls(is_main=is_main)
        for number in STOP_SIGNALS:
            signal.signal(number, signals._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return signals

    def leave_at_once(self) -> None:
        """End this process with 85; rank 0 says so."""
        if self._is_main:
            line = f"stopped before the first step ({self.reason}); the same command starts again\n"
            os.write(sys.stderr.fileno(), line.encode())
        os._exit(int(ExitCode.STOPPED))

    def hold(self) -> None:
        """Training begins: keep the next signal for a step boundary."""
        self._holding = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                shown = _SHOW_CURSOR if os.isatty(sys.stderr.fileno()) else b""  # a progress bar has hidden it
                os.write(sys.stderr.fileno(), shown + b"interrupted twice: leaving without a checkpoint\n")
                os._exit(int(ExitCode.INTERRUPTED))
        self.reason = self.reason or signal.Signals(number).name
        if not self._holding:
            self.leave()


class StopRequests:
    """Collects requests of this rank between step boundaries. The wall clock and the control folder are rank 0's."""

    def __init__(self, folder: RunFolder, signals: StopSignals | None, *, is_main: bool, max_hours: float | None,
                 started: float) -> None:
        self._folder = folder
        self._signals = signals
        self._is_main = is_main
        self._deadline = started + max_hours * 3600 if max_hours else None
        self._last_poll = 0.0
        self._waiting = 0
        self.reason = ""
        self.control_values: dict[str, str] = {}

    def take(self) -> int:
        """Requests since the last call, as bits."""
        self._waiting |= self._look(time.monotonic())
        bits, self._waiting = self._waiting, 0
        return bits

    @property
    def stopping(self) -> bool:
        """Whether this rank has been asked to stop. The request stays for `take`."""
        self._waiting |= self._look(time.monotonic())
        return bool(self._waiting & STOP)

    def discard(self) -> list[str]:
        """Remove the requests in the control folder, which came too late; their names. Rank 0's."""
        return list(poll(self._folder))

    def _look(self, now: float) -> int:
        bits = 0
        if self._signals is not None and self._signals.reason:
            bits |= SAVE | STOP
            self.reason = self.reason or self._signals.reason
        if self._is_main and now - self._last_poll >= _POLL_SECONDS:
            self._last_poll = now
            for name, value in poll(self._folder).items():
                bits |= _CONTROL_BITS[name]
                self.control_values[name] = value
                if _CONTROL_BITS[name] & STOP:
                    self.reason = self.reason or f"control/{name}"
        if self._is_main and self._deadline is not None and now >= self._deadline:
            bits |= SAVE | STOP
            self.reason = self.reason or "train.max_hours"
        return bits
