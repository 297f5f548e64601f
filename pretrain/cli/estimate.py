"""`pretrain estimate`: parameters, memory, FLOPs and hours before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Literal

import typer

from pretrain.cli.cost_text import cost_json, cost_lines
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
from pretrain.config.cost import Hardware, step_time
from pretrain.config.gpus import known_gpu
from pretrain.config.machine import gpus, memory_bytes
from pretrain.config.memory import LIBRARIES_BYTES, gib
from pretrain.config.plan import Plan, Speed, largest_micro_batch, make_plan
from pretrain.config.run import Precision
from pretrain.errors import UserError
from pretrain.monitor.throughput import peak_flops as peak_flops_of


def estimate(
    sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default: slurm.nodes, else 1.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(
        min=1, help="Ranks a machine; default: those of the slurm section, else launch.nproc.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(
        help="Where it will run. auto: cuda where --gpus-per-node is given, else as here.")] = "auto",
    epoch_samples: Annotated[int | None, typer.Option(
        min=1, help="Samples of an epoch; default: those of the prepared data.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of one device; default: what is found here.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Measured speed of the whole world.")] = None,
    peak_flops: Annotated[float | None, typer.Option(help="Peak FLOP/s of one device, as 989e12.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that training uses, as 0.4.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Device, as H100: its memory, and the time of a step.")] = None,
    efficiency: Annotated[float, typer.Option(help="With --gpu: share of the peak while nothing is sent.")] = 0.5,
    link: Annotated[float | None, typer.Option(
        help="With --gpu: GB/s that a rank sends; default: 50 between machines, 300 on one.")] = None,
    disk: Annotated[float, typer.Option(help="With --gpu: GB/s of the disk of checkpoints.")] = 2.0,
    price: Annotated[float | None, typer.Option(help="Of one device for an hour.")] = None,
    as_json: JsonOption = False, log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Print parameters, memory a rank, FLOPs, time of a step, days and cost, each by term. Runs nothing."""
    if (peak_flops is not None and mfu is None) or (mfu is not None and tokens_per_second is not None):
        raise UserError("give either --tokens-per-second, or --mfu with --peak-flops")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1")
    if gpu is not None and (mfu or tokens_per_second or peak_flops):
        raise UserError(f"--gpu {gpu}: gives the time of a step already; leave --mfu, --peak-flops and "
                        "--tokens-per-second out")
    loaded = load_config(config, preset, sets)
    run = loaded.config
    nodes = nodes or (run.slurm.nodes if run.slurm else 1)
    ranks = gpus_per_node or (run.slurm.ranks_per_node if run.slurm else run.launch.nproc)
    on_gpus = gpus_per_node or gpu or (run.slurm and run.slurm.gpus_per_node)
    wanted = device if device != "auto" else "cuda" if on_gpus else None
    facts = assumed_device(wanted)
    precision, reason = resolve_precision(run, facts)
    samples, data_name = training_samples(run)
    if epoch_samples is not None:
        samples, data_name = epoch_samples, f"{epoch_samples:,} samples (--epoch-samples)"
    peak = peak_flops or known_peak(run, precision)
    if mfu is not None and peak is None:
        raise UserError(f"--mfu {mfu}: the peak of the device is not known here; give --peak-flops too")
    plan = make_plan(run, nodes * ranks, precision=precision, device=facts.kind, epoch_samples=samples,
                     speed=Speed(tokens_per_second, peak, mfu))
    known = known_gpu(gpu) if gpu else None
    step = None
    if gpu and known:
        hardware = Hardware(_peak(gpu, precision), efficiency, (link or (50 if nodes > 1 else 300)) * 1e9,
                            known.bandwidth, disk * 1e9)
        step = step_time(run, plan, hardware)
        plan = replace(plan, hours=plan.steps * step.most / 3600, speed=Speed(plan.tokens_per_step / step.most))
    room = known.memory_bytes if known and memory is None else _device_memory(memory, facts.kind, ranks)
    fits = None if room is None else largest_micro_batch(run, nodes * ranks, room, precision=precision,
                                                         device=facts.kind)
    if as_json:
        typer.echo(json.dumps({**plan_json(plan, precision_reason=reason, data_name=data_name), "device": facts.kind,
                               "device_memory_bytes": room, "largest_micro_batch_size": fits,
                               "model": run.model.summary(), **cost_json(plan, step, price)}, indent=2))
        return
    typer.echo(f"{nodes} x {ranks} ranks on {gpu or facts.kind}")
    if "warning" in run.model.summary():
        typer.echo(f"warning     {run.model.summary()['warning']}")
    for line in plan_lines(plan, precision_reason=reason, data_name=data_name):
        typer.echo(line)
    if room is not None:
        typer.echo("\n" + _fit_line(plan, room, fits or 0))
    for number, line in enumerate(cost_lines(plan, step, price, "GPU" if facts.kind == "cuda" else "rank")):
        typer.echo(line if number else f"\n{line}")


def _peak(gpu: str, precision: Precision) -> float:
    peak = peak_flops_of(gpu, precision)
    assert peak is not None, gpu
    return peak


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
