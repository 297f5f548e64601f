"""Learning rate over updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.run import ScheduleConfig


@dataclass(slots=True)
class PlateauState:
    """Memory of the plateau schedule, the only one that has any."""

    factor: float = 1.0
    best: float = math.inf
    waited: int = 0


class LearningRate:
    """Factor of the peak learning rate at an update. Step s is the number of updates already applied.

    warmup: (s + 1) / warmup for s < warmup. cosine: from 1 to `min_lr_ratio` at the last update. linear: likewise.
    wsd: 1 until `total - decay`, then linear to `min_lr_ratio`. plateau: cut at evaluations that do not improve.
    """

    def __init__(self, config: ScheduleConfig, *, warmup_steps: int, decay_steps: int, total_steps: int) -> None:
        self.config = config
        self.warmup = min(warmup_steps, total_steps)
        self.decay = min(decay_steps, total_steps - 1)  # the first update is no part of the decay
        self.total = total_steps
        self.plateau = PlateauState()

    def factor(self, step: int) -> float:
        """Factor for the update after `step` applied ones."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        low = self.config.min_lr_ratio
        done = min(1.0, (step - self.warmup) / max(1, self.total - 1 - self.warmup))
        match self.config.name:
            case "cosine":
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1 - (1 - low) * done
            case "wsd":
                into = step - (self.total - self.decay)
                return 1.0 if into < 0 else 1 - (1 - low) * min(1.0, (into + 1) / max(1, self.decay))
            case "plateau":
                return max(low, self.plateau.factor)
            case _:
                return 1.0

    def observe(self, value: float) -> bool:
        """Tell the plateau schedule a validation figure (lower is better). True where the rate was cut."""
        if self.config.name != "plateau":
            return False
        state = self.plateau
        if value < state.best:
            state.best, state.waited = value, 0
            return False
        state.waited += 1
        if state.waited < self.config.plateau_patience:
            return False
        state.factor, state.waited = state.factor * self.config.plateau_factor, 0
        return True

    def judge_anew(self) -> None:
        """Forget the best figure; cuts that were made stay."""
        self.plateau.best, self.plateau.waited = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON scalars."""
        return {k: (v if math.isfinite(v) else None) for k, v in asdict(self.plateau).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        best = state.get("best")
        self.plateau = PlateauState(float(state["factor"]), math.inf if best is None else float(best),
                                    int(state["waited"]))
