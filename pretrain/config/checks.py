"""Checks across sections of a RunConfig: contradictions name both keys and a cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig


def check_run(config: RunConfig) -> None:
    """Raise ConfigError at the first contradiction between sections."""
    engine = config.engine
    if engine.offload.parameters != "none" and engine.zero_stage != 3:
        raise ConfigError("engine.offload.parameters", f"needs engine.zero_stage 3, which is {engine.zero_stage}")
    if engine.offload.optimizer != "none" and engine.zero_stage == 0:
        raise ConfigError("engine.offload.optimizer", "needs engine.zero_stage 1, 2 or 3, which is 0")
    if engine.precision == "bf16" and engine.zero_stage not in (2, 3):
        raise ConfigError("engine.precision", f"bf16 trains on engine.zero_stage 2 and 3, which is {engine.zero_stage}: "
                          "stage 0 takes a hidden optimizer step at start and stage 1 accumulates in bf16; use fp32 or stage 2")
    limit = config.model.max_seq_len
    if limit is not None and config.data.seq_len > limit:
        raise ConfigError("data.seq_len", f"{config.data.seq_len} is above model.max_seq_len {limit}")
    if config.batch.global_batch_size and config.batch.global_batch_size % config.data.order.lanes:
        raise ConfigError("data.order.lanes", f"{config.data.order.lanes} does not divide batch.global_batch_size "
                          f"{config.batch.global_batch_size}")
    if config.schedule.name == "plateau" and config.eval.every is None:
        raise ConfigError("schedule.name", "plateau cuts the rate at evaluations, but eval.every is null")
