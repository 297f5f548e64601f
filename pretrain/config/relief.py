"""What to change in a config whose ranks need more memory than there is, by trying it in the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config.memory import gib, rank_memory
from pretrain.config.precision import DeviceKind
from pretrain.config.run import Precision, ResolvedBatch, RunConfig

_MAX_RANKS = 4096


@dataclass(frozen=True, slots=True)
class Relief:
    """Settings that make a run smaller, and what a rank takes with them by the estimate."""

    settings: tuple[tuple[str, Any], ...]
    bytes: int

    def __str__(self) -> str:
        values = " and ".join(f"{key}={str(value).lower()}" for key, value in self.settings)
        return f"{values} ({gib(self.bytes)})"


@dataclass(frozen=True, slots=True)
class _Trial:
    """A config and its batch on the way to something smaller."""

    config: RunConfig
    batch: ResolvedBatch
    settings: tuple[tuple[str, Any], ...] = ()

    def micro(self, size: int) -> _Trial:
        """With smaller micro-batches and as much more accumulation: the same updates."""
        share = self.batch.global_batch_size // self.batch.data_parallel_size
        batch = self.batch.model_copy(update={"micro_batch_size": size, "gradient_accumulation_steps": share // size})
        settings: list[tuple[str, Any]] = [("batch.micro_batch_size", size)]
        if self.config.batch.gradient_accumulation_steps is not None or self.config.batch.global_batch_size is None:
            settings.append(("batch.gradient_accumulation_steps", share // size))
        return _Trial(self.config, batch, (*self.settings, *settings))

    def engine(self, key: str, value: Any) -> _Trial:
        """With another `engine` setting."""
        engine = self.config.engine
        if key.startswith("offload."):
            offload = engine.offload.model_copy(update={key.removeprefix("offload."): value})
            engine = engine.model_copy(update={"offload": offload})
        else:
            engine = engine.model_copy(update={key: value})
        config = self.config.model_copy(update={"engine": engine})
        return _Trial(config, self.batch, (*self.settings, (f"engine.{key}", value)))

    def cached(self) -> _Trial:
        """With the contrastive batch in chunks, of which one at a time keeps its activations."""
        config = self.config.model_copy(update={
            "objective": self.config.objective.model_copy(update={"grad_cache": True})})
        return _Trial(config, self.batch, (*self.settings, ("objective.grad_cache", True)))

    def ranks(self, world: int) -> _Trial:
        """On more ranks, each with its share of the batch."""
        micro = max(1, self.batch.micro_batch_size * self.batch.data_parallel_size // world)
        batch = self.batch.model_copy(update={"data_parallel_size": world, "micro_batch_size": micro})
        return _Trial(self.config, batch, (*self.settings, ("ranks", world)))


def reliefs(config: RunConfig, batch: ResolvedBatch, precision: Precision, device: DeviceKind,
            limit: int) -> list[Relief]:
    """Changes with which a rank stays within `limit` bytes of its device, those that cost least first.

    Single settings where one is enough, else as many together as it takes, at last more ranks. Empty where nothing is.
    """
    def weighed(trial: _Trial) -> Relief:
        return Relief(trial.settings, rank_memory(trial.config, trial.batch, precision, device).device_bytes)

    start = _Trial(config, batch)
    limit = min(limit, weighed(start).bytes - 1)
    found: dict[str, Relief] = {}
    for relief in map(weighed, _singles(start, device)):
        if relief.bytes <= limit:
            found.setdefault(relief.settings[0][0], relief)  # of each setting the mildest value
    if found:
        return list(found.values())
    for trial in _together(start, device):
        relief = weighed(trial)
        if relief.bytes <= limit:
            return [relief]
    return []


def _singles(start: _Trial, device: DeviceKind) -> Iterator[_Trial]:
    config, batch = start.config, start.batch
    share = batch.global_batch_size // batch.data_parallel_size
    for size in range(batch.micro_batch_size - 1, 0, -1):
        if share % size == 0:
            yield start.micro(size)
    if getattr(config.objective, "grad_cache", None) is False:
        yield start.cached()
    if not config.engine.activation_checkpointing:
        yield start.engine("activation_checkpointing", True)
    if batch.data_parallel_size > 1:
        for stage in range(config.engine.zero_stage + 1, 4):
            yield start.engine("zero_stage", stage)
    if device == "cuda":
        if config.engine.zero_stage and config.engine.offload.optimizer == "none":
            yield start.engine("offload.optimizer", "cpu")
        if config.engine.zero_stage == 3 and config.engine.offload.parameters == "none":
            yield start.engine("offload.parameters", "cpu")


def _together(start: _Trial, device: DeviceKind) -> Iterator[_Trial]:
    trial = start.cached() if getattr(start.config.objective, "grad_cache", None) is False else start
    trial = trial.micro(1) if trial.batch.micro_batch_size > 1 else trial
    if not trial.config.engine.activation_checkpointing:
        trial = trial.engine("activation_checkpointing", True)
        yield trial
    if trial.batch.data_parallel_size > 1 and trial.config.engine.zero_stage < 3:
        trial = trial.engine("zero_stage", 3)
        yield trial
    if device == "cuda" and trial.config.engine.zero_stage:
        if trial.config.engine.offload.optimizer == "none":
            trial = trial.engine("offload.optimizer", "cpu")
            yield trial
        if trial.config.engine.zero_stage == 3 and trial.config.engine.offload.parameters == "none":
            trial = trial.engine("offload.parameters", "cpu")
            yield trial
    if trial.config.engine.zero_stage != 3:
        trial = trial.engine("zero_stage", 3)
    world = trial.batch.data_parallel_size * 2
    while world <= _MAX_RANKS:
        yield trial.ranks(world)
        world *= 2
