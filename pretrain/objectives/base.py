"""The two protocols of training objectives.

The loader yields whole *updates*: all micro-batches of one optimizer step for this rank. A *sum objective* splits into
sums over micro-batches which the engine normalises by the total of the whole update, so that loss and gradients do not
depend on how the global batch is split. An *update objective* needs the update at once (gathered negatives, gradient
caching, rank losses) and drives forward and backward itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from pretrain.data.batch import Batch

Schedule = Callable[[int], float]
"""Weight of a term as a function of the step."""


@dataclass(frozen=True, slots=True)
class SumResult:
    """Sums of one micro-batch."""

    sums: dict[str, torch.Tensor]
    """Differentiable fp32 scalar by term, not divided by anything."""
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """(sum, count) by name, detached; the engine reduces them over the update."""


@runtime_checkable
class SumObjective(Protocol):
    """An objective that is a weighted sum of means over countable things (tokens, mostly)."""

    terms: Mapping[str, float | Schedule]
    """Weight by term."""

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Keyword tensors of one plain forward on part of this batch; checkpoints prove themselves with it."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many things each term averages over in this micro-batch. The same keys on every rank; 0 is allowed."""

    def __call__(self, model: Callable[..., Any], batch: Batch, controls: Mapping[str, float]) -> SumResult:
        """One forward of one micro-batch."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Outcome of a whole update."""

    loss: float
    """The global loss, equal on every rank."""
    metrics: dict[str, float]
    """Already reduced over ranks."""
    finite: bool
    """Agreed by all ranks before the first backward. False: nothing was accumulated and the update is skipped."""


class UpdateHandle(Protocol):
    """The engine, as an update objective sees it."""

    rank: int
    world: int
    step: int
    """Updates applied so far; a skipped one does not count."""
    total_steps: int
    """Updates of the whole run."""

    def forward(self, batch: Batch, *, grad: bool, rng: Any | None = None) -> Any:
        """The model's output; `rng` replays the random state that an earlier forward returned through `rng_state`."""

    def rng_state(self) -> Any:
        """Random state of CPU and device, to replay a forward."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients of all forwards in this loss, averaged over ranks, not divided by micro-batches."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b, ...] of every rank -> [world * b, ...] in rank order, without gradient."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, without gradient."""

    def agree(self, flag: bool) -> bool:
        """True where the flag is true on every rank."""


@runtime_checkable
class UpdateObjective(Protocol):
    """An objective over the whole update."""

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Keyword tensors of one plain forward on part of this batch; checkpoints prove themselves with it."""

    def run(self, handle: UpdateHandle, micro_batches: Sequence[Batch], controls: Mapping[str, float]) -> UpdateResult:
        """Forward and backward of one update on every rank."""
