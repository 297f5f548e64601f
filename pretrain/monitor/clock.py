"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

PHASES = ("data", "forward", "backward", "step", "save", "eval", "other")


class TimeShares:
    """Seconds of wall time per phase; whatever is in no phase is `other`, so the shares always sum to the whole.

    A phase inside another interrupts it: time is counted once. On an accelerator nothing is synchronised: kernels are
    queued, so a phase measures the host, and the wait for the device falls into whichever phase first needs a result
    (with gradient clipping that is `step`). The sum over a few steps is exact all the same.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        """`timer` returns seconds."""
        self._timer = timer
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.totals = dict.fromkeys(PHASES, 0.0)
        """Seconds per phase since the start, as of the last change of phase; may be read from another thread."""
        self._stack = ["other"]
        self.moves = 0
        """Phases entered and left so far: ranks that do the same work count alike."""
        self.interrupted = "other"
        """The innermost phase that the last error came out of."""
        self._error = 0
        self._mark = timer()
        self._phases = {name: _Phase(self, name) for name in PHASES}

    def phase(self, name: str) -> _Phase:
        """Context in which time counts for `name`, one of `PHASES`."""
        return self._phases[name]

    @property
    def current(self) -> str:
        """The phase of this moment; may be asked from another thread."""
        return self._stack[-1]

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        self._charge()
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _charge(self) -> None:
        now = self._timer()
        self._seconds[self._stack[-1]] += now - self._mark
        self.totals[self._stack[-1]] += now - self._mark
        self._mark = now

    def _interrupt(self, error: BaseException, name: str) -> None:
        if self._error != id(error):  # the phases around it see the same error pass
            self._error, self.interrupted = id(error), name

    def _enter(self, name: str) -> None:
        self._charge()
        self._stack.append(name)
        self.moves += 1

    def _leave(self) -> None:
        self._charge()
        self._stack.pop()
        self.moves += 1


class _Phase:
    """One phase as a context; made once, entered often."""

    __slots__ = ("_name", "_shares")

    def __init__(self, shares: TimeShares, name: str) -> None:
        self._shares = shares
        self._name = name

    def __enter__(self) -> None:
        self._shares._enter(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None:
            self._shares._interrupt(error, self._name)
        self._shares._leave()
