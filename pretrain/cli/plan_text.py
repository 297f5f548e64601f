"""A plan as text, for `pretrain estimate` and `pretrain train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.config.machine import device_facts, gpus
from pretrain.config.memory import gib
from pretrain.config.plan import Plan, Speed, windows
from pretrain.config.precision import DeviceFacts, DeviceKind, advise_precision
from pretrain.config.run import Precision, RunConfig
from pretrain.config.source import PairsConfig, ShardsConfig, SyntheticConfig
from pretrain.errors import PretrainError
from pretrain.monitor.throughput import peak_flops

ASSUMED_MFU = 0.4
"""Model FLOPs utilisation behind the hours of a dry run: what large dense models reach, not a measurement."""


def assumed_device(kind: DeviceKind | None) -> DeviceFacts:
    """Facts of this machine; for another kind of device than its own, those of a current one."""
    here = device_facts()
    if kind is None or kind == here.kind:
        return here
    return DeviceFacts("cuda", cuda_capability=(9, 0)) if kind == "cuda" else DeviceFacts(kind)


def resolve_precision(config: RunConfig, facts: DeviceFacts) -> tuple[Precision, str]:
    """(precision, where it comes from) of a run on a device like `facts`."""
    if config.engine.precision != "auto":
        return config.engine.precision, "engine.precision"
    precision, reason = advise_precision(facts, config.engine.zero_stage)
    return precision, f"auto: {reason}"


def training_samples(config: RunConfig) -> tuple[int | None, str]:
    """(samples of one epoch, how to name the data); None where it is not prepared or has no epochs."""
    source = config.data.source
    if isinstance(source, SyntheticConfig):
        return source.samples, f"{source.kind}, {source.samples:,} samples"
    if not isinstance(source, ShardsConfig | PairsConfig):
        return None, source.kind
    from data_prep.manifest import Manifest
    name = f"{source.path} split {source.split}"
    try:
        record = Manifest.read(Path(source.path)).splits.get(source.split)
    except PretrainError:
        return None, f"{name}, not there"
    if record is None:
        return None, f"{name}, which the dataset lacks"
    if isinstance(source, PairsConfig):
        return record.docs, f"{name}, {record.docs:,} pairs"
    if source.packing == "best_fit":
        from data_prep.packing import load_plan
        plan = load_plan(Manifest.read(Path(source.path)), source.split, config.data.seq_len)
        return plan.samples, f"{name}, {record.tokens:,} tokens, packed with {plan.padding:.2%} padding"
    return windows(record.tokens, config.data.seq_len, config.data.stride), f"{name}, {record.tokens:,} tokens"


def known_peak(config: RunConfig, precision: Precision) -> float | None:
    """Peak FLOP/s of one device: `monitor.peak_flops`, else of the GPU here; None on a CPU."""
    cards = gpus()
    return config.monitor.peak_flops or (peak_flops(cards[0].name, precision) if cards else None)


def assumed_speed(config: RunConfig, precision: Precision) -> Speed:
    """For a first idea of the hours: `ASSUMED_MFU` of the peak, where a peak is known."""
    return Speed(peak_flops=known_peak(config, precision), mfu=ASSUMED_MFU)


def plan_lines(plan: Plan, *, precision_reason: str, data_name: str) -> Iterator[str]:
    """Figures, then the memory table of the phase that takes most."""
    batch, count = plan.batch, plan.parameters
    epochs = f", {plan.epochs:.3g} epochs" if plan.epochs is not None else ""
    rows = [
        ("parameters", f"{count.total:,} ({count.trainable:,} trainable)"),
        ("precision", f"{plan.precision} ({precision_reason})"),
        ("batch", f"{batch.global_batch_size} = {batch.micro_batch_size} x {batch.gradient_accumulation_steps} x "
                  f"{batch.data_parallel_size} (micro-batch x accumulation x ranks)"),
        ("data", data_name),
        ("steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens"),
        ("tokens", f"{plan.tokens:,} ({plan.tokens / max(1, count.total):.3g} a parameter{epochs})"),
        ("FLOPs", f"{plan.flops_per_token:.3g} a token, {plan.flops:.3g} in all"),
        ("time", _time(plan)),
        ("checkpoint", gib(plan.checkpoint_bytes)),
    ]
    yield from (f"{name:<12}{text}" for name, text in rows)
    yield ""
    yield from _memory_lines(plan)


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    terms = [term for term in memory.phases[memory.peak] if term.bytes]
    width = max(len(term.name) for term in terms)
    count = plan.parameters
    yield f"memory a rank, in the {memory.peak} phase, where it is largest (libraries not counted); bytes with"
    yield (f"P = {count.trainable:,} trainable and F = {count.total - count.trainable:,} frozen parameters, "
           f"W = {plan.world_size} ranks, B = {memory.bucket_elements:,} elements of a reduce bucket:")
    for term in terms:
        yield f"  {term.name:<{width}}  {gib(term.bytes):>10}  {term.formula}{'  [host]' if term.host else ''}"
    yield f"  {'sum':<{width}}  {gib(memory.device_bytes):>10}"
    if memory.host_bytes:
        yield f"  {'in main memory':<{width}}  {gib(memory.host_bytes):>10}"


def plan_json(plan: Plan, *, precision_reason: str, data_name: str) -> dict[str, Any]:
    """The same figures for programs; memory of all phases in bytes."""
    return {
        "parameters": plan.parameters.total, "trainable": plan.parameters.trainable, "precision": plan.precision,
        "precision_reason": precision_reason, "world_size": plan.world_size, **plan.batch.model_dump(),
        "data": data_name, "steps": plan.steps, "tokens_per_step": plan.tokens_per_step, "tokens": plan.tokens,
        "epochs": plan.epochs, "flops_per_token": plan.flops_per_token, "flops": plan.flops, "hours": plan.hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "memory": {"peak_phase": plan.memory.peak, "device_bytes": plan.memory.device_bytes,
                   "host_bytes": plan.memory.host_bytes,
                   "phases": {phase: {term.name: term.bytes for term in terms}
                              for phase, terms in plan.memory.phases.items()}}}


def _time(plan: Plan) -> str:
    if plan.hours is None:
        return "unknown: give --tokens-per-second, or --peak-flops and --mfu, to `pretrain estimate`"
    speed = plan.speed
    basis = f"{speed.tokens_per_second:,.0f} tokens/s" if speed.tokens_per_second else \
        f"{speed.mfu or 0:.0%} of {(speed.peak_flops or 0) / 1e12:.4g} TFLOP/s a device"
    return f"{_duration(plan.hours)} at {basis}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
