"""Checks across sections of a RunConfig: contradictions name both keys and a cure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.config import deepspeed_keys
from pretrain.config.interval import Interval
from pretrain.config.model import Section
from pretrain.config.needle import NeedleConfig
from pretrain.config.objective import InfoNCEConfig
from pretrain.config.source import MixtureConfig, PairsConfig, SourceConfig
from pretrain.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig


def check_run(config: RunConfig) -> None:
    """Raise ConfigErrors with every contradiction between sections."""
    found = [*_engine(config), *deepspeed_keys.problems(config.engine.deepspeed), *_data(config), *_schedule(config),
             *_spikes(config), *_needle(config), *_infonce(config), *config.model.objective_problems(config.objective)]
    if found:
        raise ConfigErrors(found)


def _engine(config: RunConfig) -> Iterator[ConfigError]:
    engine = config.engine
    stage = engine.zero_stage
    if engine.offload.parameters != "none" and stage != 3:
        yield ConfigError("engine.offload.parameters", f"needs engine.zero_stage 3, which is {stage}; "
                          "set the stage to 3 or the offload to none")
    if engine.offload.optimizer != "none" and stage == 0:
        yield ConfigError("engine.offload.optimizer", "needs engine.zero_stage 1, 2 or 3, which is 0; "
                          "raise the stage or set the offload to none")
    if engine.precision == "bf16" and stage not in (2, 3):
        yield ConfigError("engine.precision", f"bf16 trains on engine.zero_stage 2 and 3, which is {stage}: stage 0 "
                          "takes a hidden optimizer step at start and stage 1 accumulates in bf16; "
                          "use fp32 or stage 2")
    if engine.precision == "fp16" and config.model.no_fp16 is not None:
        yield ConfigError("engine.precision", f"fp16 is not for model.family {config.model.family}: "
                          f"{config.model.no_fp16}; use bf16 or fp32")
    elif engine.precision == "fp16" and stage == 0:
        yield ConfigError("engine.precision", "fp16 trains on engine.zero_stage 1, 2 and 3, which is 0: there "
                          "gradients would be clipped before their loss scale is taken off; use fp32 or stage 2")


def _data(config: RunConfig) -> Iterator[ConfigError]:
    limit = config.model.max_seq_len
    if limit is not None and config.data.seq_len > limit:
        yield ConfigError("data.seq_len", f"{config.data.seq_len} is above model.max_seq_len {limit}")
    yield from _pair_lengths(config)
    total, lanes = config.batch.global_batch_size, config.data.order.lanes
    if total and total % lanes:
        yield ConfigError("data.order.lanes", f"{lanes} does not divide batch.global_batch_size {total}")
    micro, accumulation = config.batch.micro_batch_size or 1, config.batch.gradient_accumulation_steps or 1
    if total and total % (micro * accumulation):
        share = micro * accumulation
        below, above = total // share * share, (total // share + 1) * share
        yield ConfigError("batch.global_batch_size", f"{total} is no multiple of {share} (micro_batch_size {micro} x "
                          f"gradient_accumulation_steps {accumulation}) for any number of ranks; "
                          f"use {f'{below} or ' if below else ''}{above}, or leave one of the three out")


    if isinstance(config.data.source, MixtureConfig):
        for key, interval in _intervals(config, ""):
            if interval.unit == "epochs":
                yield ConfigError(key, f"{interval}: data.source.kind mixture has no epochs, its parts come round at "
                                  "different times; give it in steps, samples or tokens")


def _pair_lengths(config: RunConfig) -> Iterator[ConfigError]:
    """Pairs whose texts are longer than the model takes."""
    limit, source = config.model.max_seq_len, config.data.source
    named: list[tuple[str, SourceConfig | None]] = [("data.validation", config.data.validation)]
    if isinstance(source, MixtureConfig):
        named += [(f"data.source.parts.{number}.source", part.source) for number, part in enumerate(source.parts)]
    for key, pairs in [("data.source", source), *named]:
        if limit is None or not isinstance(pairs, PairsConfig):
            continue
        for name in ("query_length", "passage_length"):
            if getattr(pairs, name) > limit:
                yield ConfigError(f"{key}.{name}", f"{getattr(pairs, name)} is above model.max_seq_len {limit}")


def _intervals(section: Section, prefix: str) -> Iterator[tuple[str, Interval]]:
    """Every interval of a config by its dotted key."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Interval):
            yield prefix + name, value
        elif isinstance(value, Section):
            yield from _intervals(value, f"{prefix}{name}.")


def _spikes(config: RunConfig) -> Iterator[ConfigError]:
    if config.train.on_spike == "skip" and config.objective.protocol == "update":
        yield ConfigError("train.on_spike", f"skip needs the loss before the last backward, which objective.name "
                          f"{config.objective.name} runs by itself; use rewind or warn")
    if config.train.on_spike == "rewind" and config.checkpoint.every is None:
        yield ConfigError("train.on_spike", "rewind goes back to checkpoints, but checkpoint.every is null; give it an "
                          "interval or use skip")


def _needle(config: RunConfig) -> Iterator[ConfigError]:
    source = config.data.source
    if config.objective.name == "needle" and not (isinstance(source, NeedleConfig) and source.needle_query):
        yield ConfigError("objective.name", "needle needs data.source.kind needle with needle_query true; without a "
                          "query there is nothing to answer, use causal_lm")


def _infonce(config: RunConfig) -> Iterator[ConfigError]:
    objective = config.objective
    if isinstance(objective, InfoNCEConfig) and objective.infonce_weight \
            and getattr(config.model, "readout_from", "none") == "none":
        yield ConfigError("objective.infonce_weight", "scores what a memory says, but model.readout_from is none; use "
                          "family afrb with pvm, or weight 0")


def _schedule(config: RunConfig) -> Iterator[ConfigError]:
    for key in ("patience", "target_perplexity"):
        value = getattr(config.train, key)
        if value is not None and config.eval.every is None:
            yield ConfigError(f"train.{key}", f"{value} is judged at evaluations, but eval.every is null; "
                              f"give eval.every an interval or leave train.{key} out")
    for key, interval in (("train.patience_after", config.train.patience_after),
                          ("eval.embedding.health_after", config.eval.embedding.health_after)):
        if interval is not None and interval.unit == "epochs":
            yield ConfigError(key, f"{interval}: steps, micro_steps, samples or tokens would be right")
    if config.schedule.name == "plateau" and config.eval.every is None:
        yield ConfigError("schedule.name", "plateau cuts the rate at evaluations, but eval.every is null; "
                          "give eval.every an interval or choose another schedule")
