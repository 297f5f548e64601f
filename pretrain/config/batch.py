"""The batch equation: global = micro x accumulation x data-parallel size."""

from __future__ import annotations

from pretrain.config.run import BatchConfig, ResolvedBatch
from pretrain.errors import ConfigError


def resolve_batch(batch: BatchConfig, data_parallel_size: int) -> ResolvedBatch:
    """Derive the missing member of the equation.

    Raises ConfigError, naming values that would do, where the members contradict each other or do not divide.
    """
    total, micro, accumulation = batch.global_batch_size, batch.micro_batch_size, batch.gradient_accumulation_steps
    world = data_parallel_size
    if total is None:
        micro, accumulation = micro or 8, accumulation or 1
        total = micro * accumulation * world
    elif total % world:
        raise ConfigError("batch.global_batch_size", f"{total} is not a multiple of {world} ranks; "
                          f"use {max(1, total // world) * world} or {(total // world + 1) * world}")
    share = total // world
    if micro is None and accumulation is None:
        micro, accumulation = share, 1
    elif micro is None:
        assert accumulation is not None
        if share % accumulation:
            raise ConfigError("batch.gradient_accumulation_steps", f"{accumulation} does not divide the {share} "
                              f"samples of a rank ({total} / {world} ranks); use one of {_divisors(share)}")
        micro = share // accumulation
    elif accumulation is None:
        if share % micro:
            raise ConfigError("batch.micro_batch_size", f"{micro} does not divide the {share} samples of a rank "
                              f"({total} / {world} ranks); use one of {_divisors(share)}")
        accumulation = share // micro
    assert micro is not None and accumulation is not None
    if micro * accumulation * world != total:
        raise ConfigError("batch.global_batch_size", f"{total} is not {micro} x {accumulation} x {world} "
                          f"(micro_batch_size x gradient_accumulation_steps x ranks = {micro * accumulation * world}); "
                          "leave one of the three out and it is derived")
    return ResolvedBatch(global_batch_size=total, micro_batch_size=micro, gradient_accumulation_steps=accumulation,
                         data_parallel_size=world)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
