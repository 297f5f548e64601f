"""Where a run stands: the part of its state that is neither weights nor moments nor random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

from pretrain.config.interval import Progress
from pretrain.config.run import ResolvedBatch


class Rewind(TypedDict):
    """A return to a checkpoint in the running process."""

    k: int
    """The batch that was the reason; those from the checkpoint on up to it are passed over."""
    step: int
    """Updates applied when it came."""
    loss: float | None
    """None where it was not finite."""
    checkpoint: str
    to_step: int
    to_k: int


@dataclass(slots=True)
class RunState:
    """`k` counts global batches consumed, `step` counts updates applied; skips make them differ."""

    k: int = 0
    step: int = 0
    saves: int = 0
    """Checkpoints written so far that count for `checkpoint.mirror.every`: those that were due, not those for being
    best, asked for or the last; all of them where every one is copied.
    """
    counted: bool = True
    """Whether the newest checkpoint is one of them."""
    best: float | None = None
    best_steps: list[int] = field(default_factory=list)
    """Steps at which the selecting metric improved, in order: the last ones are the best."""
    evaluations_without_improvement: int = 0
    patience_best: float | None = None
    """The figure when patience last started over."""
    lr_override: float | None = None
    stopped_early: str | None = None
    rewinds: list[Rewind] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)
    """Evaluators that a request to stop cut short at this step; they run first when the run goes on."""

    def progress(self, batch: ResolvedBatch, seq_len: int, epoch_samples: int | None) -> Progress:
        """Progress for intervals. Micro-steps, samples and tokens count what was consumed."""
        return replace(batch.progress(self.k, seq_len, epoch_samples), steps=self.step)

    def observe(self, value: float, *, higher_is_better: bool, least_gain: float = 0.0, counts: bool = True) -> bool:
        """Tell the state the figure that selects the best model. True where it is a new best.

        Patience starts over where the figure is better by more than `least_gain` than when it last did; where it is
        not, an evaluation that `counts` has brought no improvement.
        """
        sign, finite = 1 if higher_is_better else -1, math.isfinite(value)
        if self.patience_best is None:
            self.patience_best = self.best
        if finite and (self.patience_best is None or sign * (value - self.patience_best) > least_gain):
            self.patience_best, self.evaluations_without_improvement = value, 0
        elif counts:
            self.evaluations_without_improvement += 1
        improved = finite and (self.best is None or sign * (value - self.best) > 0)
        if improved:
            self.best = value
            self.best_steps.append(self.step)
        return improved

    def judge_anew(self) -> None:
        """Forget the best: what comes is judged otherwise."""
        self.best, self.best_steps, self.evaluations_without_improvement, self.stopped_early = None, [], 0, None
        self.patience_best = None

    def to_json(self) -> dict[str, Any]:
        """JSON scalars and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        """The inverse of `to_json`; keys of later versions are an error, missing ones take their default."""
        return cls(**values)
