"""What a run will cost, from its config alone: updates, tokens, memory a rank, FLOPs, hours, bytes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.memory import RankMemory, rank_memory
from pretrain.config.model import ParameterCount
from pretrain.config.precision import DeviceKind
from pretrain.config.run import Precision, ResolvedBatch, RunConfig
from pretrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast training will be: measured tokens/s of the whole world, or a peak and the share of it that is used."""

    tokens_per_second: float | None = None
    peak_flops: float | None = None
    """Peak FLOP/s of one device."""
    mfu: float | None = None
    """Model FLOPs utilisation in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures of a run before it starts."""

    parameters: ParameterCount
    world_size: int
    batch: ResolvedBatch
    precision: Precision
    seq_len: int
    steps: int
    tokens_per_step: int
    epoch_samples: int | None
    """Samples in one pass over the training data, None where it is not there or has no epochs."""
    memory: RankMemory
    flops_per_token: float
    """Training FLOPs: three times the forward pass."""
    speed: Speed
    hours: float | None
    checkpoint_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def epochs(self) -> float | None:
        """Passes over the training split."""
        return self.steps * self.batch.global_batch_size / self.epoch_samples if self.epoch_samples else None


def make_plan(config: RunConfig, world_size: int, *, precision: Precision, device: DeviceKind,
              epoch_samples: int | None = None, speed: Speed | None = None) -> Plan:
    """The plan of `config` on `world_size` ranks.

    Args:
        precision: what the run will use (`engine.precision: auto` resolved by `advise_precision`).
        device: where it runs; CPU and CUDA keep different temporaries.
        epoch_samples: samples of the training data, where it is prepared already; needed for a length in epochs.
        speed: for the hours; without it, or with half of a pair, they stay unknown.

    Raises:
        ConfigError: a batch that does not divide over the ranks, a length in epochs of unknown data.
    """
    batch = config.batch.resolve(world_size)
    seq_len = config.data.seq_len
    tokens_per_step = batch.global_batch_size * config.data.tokens_per_sample
    try:
        steps = config.train.length.to_steps(micro_steps_per_step=batch.gradient_accumulation_steps,
                                             samples_per_step=batch.global_batch_size, tokens_per_step=tokens_per_step,
                                             epoch_samples=epoch_samples)
    except ValueError:
        raise ConfigError("train.length", f"{config.train.length} needs the prepared data, which was not found; "
                          "prepare it first, give the length in steps or tokens, or to `pretrain estimate` the number "
                          "of its samples (--epoch-samples)") from None
    count, speed = config.model.parameter_count(), speed or Speed()
    flops_per_token = 3 * config.model.flops_per_token(seq_len)
    return Plan(parameters=count, world_size=world_size, batch=batch, precision=precision, seq_len=seq_len, steps=steps,
                tokens_per_step=tokens_per_step, epoch_samples=epoch_samples,
                memory=rank_memory(config, batch, precision, device), flops_per_token=flops_per_token,
                speed=speed,
                hours=_hours(steps * tokens_per_step, flops_per_token, world_size, speed),
                checkpoint_bytes=checkpoint_bytes(count, config.engine.zero_stage, precision))


def never_counts(config: RunConfig, batch: ResolvedBatch, steps: int) -> list[str]:
    """A line for each "from here on" that lies behind the end of a run of `steps` updates."""
    end = batch.progress(steps, config.data.tokens_per_sample)
    watched = config.model.kind == "encoder" and config.objective.protocol == "update" and config.eval.every is not None
    keys = (("train.patience_after", config.train.patience_after if config.train.patience else None,
             "train.patience never ends it"),
            ("eval.embedding.health_after", config.eval.embedding.health_after if watched else None,
             "no evaluation warns of a collapse"))
    return [f"{key}: {interval} are more than the run has ({end.in_unit(interval.unit):,.0f}): {meaning}"
            for key, interval, meaning in keys if interval is not None and end.in_unit(interval.unit) < interval.amount]


def windows(tokens: int, seq_len: int, stride: int | None) -> int:
    """Samples in a split: windows of seq_len + 1 tokens that start every `stride` tokens; a short tail is dropped."""
    return max(0, (tokens - seq_len - 1) // (stride or seq_len) + 1)


def _hours(tokens: int, flops_per_token: float, world_size: int, speed: Speed) -> float | None:
    if speed.tokens_per_second:
        return tokens / speed.tokens_per_second / 3600
    if speed.peak_flops and speed.mfu:
        return tokens * flops_per_token / (speed.peak_flops * speed.mfu * world_size) / 3600
    return None


def checkpoint_bytes(count: ParameterCount, zero_stage: int, precision: Precision) -> int:
    """Bytes of one checkpoint over all ranks: weights, fp32 master copies and Adam's two moments; frozen ones in fp32.

    Stage 0 has no master copy beside its weights. Stages 1 to 3 write the fp32 master as optimizer state; stage 3
    writes no other copy of the trainable weights.
    """
    element = 4 if precision == "fp32" else 2
    frozen = 4 * (count.total - count.trainable)
    weights = 0 if zero_stage == 3 else element * count.trainable
    return weights + frozen + (8 if zero_stage == 0 else 12) * count.trainable


def largest_micro_batch(config: RunConfig, world_size: int, memory_bytes: int, *, precision: Precision,
                        device: DeviceKind) -> int:
    """The largest micro-batch of a rank that stays within `memory_bytes` of its device; 0 where not even one fits.

    With the accumulation that the config states, else none.
    """
    steps = config.batch.gradient_accumulation_steps or 1

    def fits(micro: int) -> bool:
        batch = ResolvedBatch(global_batch_size=micro * steps * world_size, micro_batch_size=micro,
                              gradient_accumulation_steps=steps, data_parallel_size=world_size)
        return rank_memory(config, batch, precision, device).device_bytes <= memory_bytes

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
