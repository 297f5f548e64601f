"""Rules that tell a healthy run from a sick one. Pure: numbers in, events out; nothing is logged or changed here."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from pretrain.errors import Divergence


class BadSteps:
    """Counts updates that were skipped and says when to give up."""

    def __init__(self, max_in_a_row: int, max_per_1000: int | None = None) -> None:
        self.max_in_a_row, self.max_per_1000 = max_in_a_row, max_per_1000
        self.skipped: list[int] = []
        """Numbers k of the global batches that were skipped."""
        self.spikes: list[int] = []
        """Those among them whose loss was finite and a spike."""
        self.in_a_row = 0

    def update(self, k: int, applied: bool, loss: float, grad_norm: float, *, spike: bool = False) -> None:
        """Judge the update of global batch `k`, the same on every rank. One that was not applied was no `spike`: then
        its loss or gradient was not finite.

        Raises Divergence once `max_in_a_row` updates in a row were skipped, or `max_per_1000` of the last 1000.
        """
        if applied:
            self.in_a_row = 0
            return
        self.skipped.append(k)
        if spike:
            self.spikes.append(k)
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            self._give_up(f"the last {self.in_a_row} updates", self.in_a_row, loss, grad_norm)
        recent = sum(k - other < 1000 for other in self.skipped)
        if self.max_per_1000 is not None and recent >= self.max_per_1000:
            self._give_up(f"{recent} of the last 1000 updates", recent, loss, grad_norm)

    def _give_up(self, which: str, count: int, loss: float, grad_norm: float) -> NoReturn:
        first, last = self.skipped[-count], self.skipped[-1]
        what = "not finite or loss spikes" if first <= max(self.spikes, default=-1) else "not finite"
        raise Divergence(f"{which} were {what} (batches {first} to {last}; last loss {loss:g}, gradient norm "
                         f"{grad_norm:g}): lower optim.lr, lengthen schedule.warmup, or look at these batches with "
                         "`pretrain data at`")

    def forget(self) -> None:
        """Start over: the numbers of batches mean others from now on."""
        self.skipped, self.spikes, self.in_a_row = [], [], 0

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"skipped": list(self.skipped), "spikes": list(self.spikes), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.skipped, self.in_a_row = list(state["skipped"]), int(state["in_a_row"])
        self.spikes = list(state.get("spikes", ()))


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person should look at."""

    kind: Literal["loss_spike", "grad_spike", "grad_zero", "grad_large"]
    step: int
    value: float
    median: float
    """The running median; of a gradient norm that is too large the limit."""
    deviations: float
    """Distance from the running median, in standard deviations estimated from the median absolute deviation."""

    def __str__(self) -> str:
        if self.kind == "grad_zero":
            return f"step {self.step}: the gradient norm is zero: nothing is being learned"
        if self.kind == "grad_large":
            return (f"step {self.step}: gradient norm {self.value:.4g} before clipping is above {self.median:g}: "
                    "beyond warm-up, lower optim.lr or lengthen schedule.warmup")
        what = "loss" if self.kind == "loss_spike" else "gradient norm"
        return (f"step {self.step}: {what} {self.value:.4g} is {self.deviations:.1f} deviations above its running "
                f"median {self.median:.4g}")


class SpikeDetector:
    """Values far above their running median, measured by the median absolute deviation (MAD).

    Both are robust: a spike hardly moves them, and a lasting change of level stops raising alarms once it fills half
    of the window. 1.4826 * MAD estimates the standard deviation of normal noise.
    """

    def __init__(self, kind: Literal["loss_spike", "grad_spike"], window: int = 128, threshold: float = 8.0,
                 warmup: int = 32, floor: float = 0.01, least: float = 1e-4) -> None:
        """`threshold`: deviations; `warmup`: values before the first judgement; `floor`: least deviation, as a
        fraction of the median, and `least` as a number, so that noise on a nearly constant series is no spike: neither
        of a loss that stands still nor of one that has come down to nothing.
        """
        self.kind = kind
        self._values: deque[float] = deque(maxlen=window)
        self._threshold = threshold
        self._warmup = warmup
        self._floor = floor
        self._least = least

    def update(self, step: int, value: float) -> Alarm | None:
        """Judge `value` against those before it, and remember it. Non-finite ones are no business of this rule."""
        alarm = self.judge(step, value)
        if math.isfinite(value):
            self._values.append(value)
        return alarm

    def judge(self, step: int, value: float) -> Alarm | None:
        """Judge `value` against those before it, and forget it."""
        if not math.isfinite(value) or len(self._values) < self._warmup:
            return None
        median = statistics.median(self._values)
        if value <= median:
            return None
        mad = statistics.median(abs(other - median) for other in self._values)
        deviation = max(1.4826 * mad, self._floor * abs(median), self._least)
        deviations = (value - median) / deviation
        return Alarm(self.kind, step, value, median, deviations) if deviations > self._threshold else None

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._values = deque(state["values"], maxlen=self._values.maxlen)


class Health:
    """All rules of a run together."""

    def __init__(self, max_bad_steps: int, max_bad_per_1000: int | None = None,
                 grad_warn: float | None = None) -> None:
        """`grad_warn`: gradient norm that an update is told of by itself, if the one before had less."""
        self._grad_warn, self._above = grad_warn, False
        self.bad_steps = BadSteps(max_bad_steps, max_bad_per_1000)
        self._loss = SpikeDetector("loss_spike")
        # Gradient norms have a long tail by nature: only what is far out is worth a line.
        self._grad = SpikeDetector("grad_spike", threshold=20.0, least=1e-12)

    def spike(self, step: int, loss: float) -> Alarm | None:
        """Whether `loss` of an update that is not applied yet is a spike; remembers nothing."""
        return self._loss.judge(step, loss)

    def update(self, step: int, k: int, applied: bool, loss: float, grad_norm: float, *,
               spike: bool = False, whole: bool = True) -> list[Alarm]:
        """Judge one update; one that was skipped (for a `spike` or for not being finite) leaves the medians alone.

        Where `loss` is not that of the `whole` update but this rank's share, `late_loss` judges it once it is known.
        Raises Divergence after too many skipped ones.
        """
        self.bad_steps.update(k, applied, loss, grad_norm, spike=spike)
        if not applied:
            return []
        alarms = [self._loss.update(step, loss) if whole else None, self._grad.update(step, grad_norm)]
        if grad_norm == 0.0:
            alarms.append(Alarm("grad_zero", step, 0.0, 0.0, 0.0))
        above = self._grad_warn is not None and grad_norm > self._grad_warn
        if self._grad_warn is not None and above and not self._above:
            alarms.append(Alarm("grad_large", step, grad_norm, self._grad_warn, 0.0))
        self._above = above
        return [alarm for alarm in alarms if alarm is not None]

    def late_loss(self, step: int, loss: float) -> Alarm | None:
        """Judge the loss of an applied update that `update` took without it. Losses come in the order of the steps."""
        return self._loss.update(step, loss)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"bad_steps": self.bad_steps.state_dict(), "loss": self._loss.state_dict(),
                "grad": self._grad.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.bad_steps.load_state_dict(state["bad_steps"])
        self._loss.load_state_dict(state["loss"])
        self._grad.load_state_dict(state["grad"])
