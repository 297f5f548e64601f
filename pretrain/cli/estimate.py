"""`pretrain estimate`: parameters, memory, FLOPs and hours before anything runs."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from pretrain.cli.options import (
    ConfigArgument,
    JsonOption,
    LogLevel,
    LogLevelOption,
    PresetOption,
    SetOption,
    load_config,
)
from pretrain.cli.plan_text import (
    assumed_device,
    known_peak,
    plan_json,
    plan_lines,
    resolve_precision,
    training_samples,
)
from pretrain.config.machine import gpus, memory_bytes
from pretrain.config.memory import LIBRARIES_BYTES, gib
from pretrain.config.plan import Plan, Speed, largest_micro_batch, make_plan
from pretrain.errors import UserError


def estimate(
    sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks a machine; default: launch.nproc.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(
        help="Where it will run. auto: cuda where --gpus-per-node is given, else as here.")] = "auto",
    memory: Annotated[float | None, typer.Option(help="GiB of one device; default: what is found here.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Measured speed of the whole world.")] = None,
    peak_flops: Annotated[float | None, typer.Option(help="Peak FLOP/s of one device, as 989e12.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that training uses, as 0.4.")] = None,
    as_json: JsonOption = False, log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Print parameters, memory a rank by term, FLOPs, hours, and the largest micro-batch that fits. Runs nothing."""
    if (peak_flops is not None and mfu is None) or (mfu is not None and tokens_per_second is not None):
        raise UserError("give either --tokens-per-second, or --mfu with --peak-flops")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1")
    loaded = load_config(config, preset, sets)
    run = loaded.config
    ranks = gpus_per_node or run.launch.nproc
    wanted = device if device != "auto" else "cuda" if gpus_per_node else None
    facts = assumed_device(wanted)
    precision, reason = resolve_precision(run, facts)
    samples, data_name = training_samples(run)
    peak = peak_flops or known_peak(run, precision)
    if mfu is not None and peak is None:
        raise UserError(f"--mfu {mfu}: the peak of the device is not known here; give --peak-flops too")
    plan = make_plan(run, nodes * ranks, precision=precision, device=facts.kind, epoch_samples=samples,
                     speed=Speed(tokens_per_second, peak, mfu))
    room = _device_memory(memory, facts.kind, ranks)
    fits = None if room is None else largest_micro_batch(run, nodes * ranks, room, precision=precision,
                                                         device=facts.kind)
    if as_json:
        typer.echo(json.dumps({**plan_json(plan, precision_reason=reason, data_name=data_name), "device": facts.kind,
                               "device_memory_bytes": room, "largest_micro_batch_size": fits}, indent=2))
        return
    typer.echo(f"{nodes} x {ranks} ranks on {facts.kind}")
    for line in plan_lines(plan, precision_reason=reason, data_name=data_name):
        typer.echo(line)
    if room is not None:
        typer.echo("\n" + _fit_line(plan, room, fits or 0))


def _fit_line(plan: Plan, room: int, fits: int) -> str:
    if not fits:
        return f"not even a micro-batch of one sample fits in {gib(room)}"
    share = plan.batch.global_batch_size // plan.batch.data_parallel_size
    divisor = max(micro for micro in range(1, min(fits, share) + 1) if share % micro == 0)
    return (f"largest micro-batch in {gib(room)}: {fits}; that divides the {share} samples of a rank: {divisor} "
            f"(the run has {plan.batch.micro_batch_size})")


def _device_memory(given: float | None, kind: str, ranks: int) -> int | None:
    """Bytes that a rank may use: what was given, else of the GPU here, or a rank's share of this machine's memory."""
    if given is not None:
        return int(given * 2**30)
    if kind == "cuda":
        return min((card.memory_bytes for card in gpus()), default=None)
    return max(0, memory_bytes() // ranks - LIBRARIES_BYTES)
