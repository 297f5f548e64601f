"""Builds a Trainer: data, model, engine, resume; in the order in which a mistake is cheapest."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from transformers import PreTrainedModel

from pretrain.config.changes import JUDGED, REOPENS, rule_of
from pretrain.config.interval import Interval
from pretrain.config.load import LoadedConfig
from pretrain.config.machine import device_facts
from pretrain.config.plan import never_counts
from pretrain.config.precision import DeviceFacts, advise_precision
from pretrain.config.registry import FAMILIES, OBJECTIVES, resolve
from pretrain.config.run import Precision, ResolvedBatch, RunConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.open import TrainingData, open_training
from pretrain.engine import checkpoint, rng
from pretrain.engine.build import Engine, build_engine, build_model
from pretrain.engine.checkpoint import Snapshot
from pretrain.engine.claim import Claim, check_changes, check_data, take_over
from pretrain.engine.consolidate import load_initial_weights
from pretrain.engine.distributed import World
from pretrain.engine.evaluator import Evaluator
from pretrain.engine.initial import check_initial, tell_initial
from pretrain.engine.keeping import Keeper
from pretrain.engine.mirror import Mirror
from pretrain.engine.outofmemory import memory_told
from pretrain.engine.reporting import Reporter
from pretrain.engine.schedule import LearningRate
from pretrain.engine.state import RunState
from pretrain.engine.stopping import StopRequests, StopSignals
from pretrain.engine.trainer import Trainer
from pretrain.engine.views import FamilyStartContext
from pretrain.errors import CheckFailed, ConfigError, UserError
from pretrain.models.base import Family, Hooks
from pretrain.monitor.clock import TimeShares
from pretrain.monitor.health import Health
from pretrain.monitor.profiler import StepProfiler
from pretrain.monitor.progress import Progress
from pretrain.monitor.throughput import Throughput, peak_flops
from pretrain.monitor.writers import MetricsWriter, WandbOptions

_log = logging.getLogger("pretrain")


def check_evaluations(config: RunConfig, evaluators: Sequence[Evaluator]) -> None:
    """Raise ConfigError where something waits for evaluations that will never come."""
    waits = {"train.patience": config.train.patience, "train.target_perplexity": config.train.target_perplexity,
             "schedule.name": "plateau" if config.schedule.name == "plateau" else None}
    for key, value in waits.items():
        if value is not None and not evaluators:
            raise ConfigError(key, f"{value} is judged at evaluations, but there is nothing to evaluate on: the data "
                              "have no split val; name a data.validation or leave it out")


def choose(config: RunConfig, world: World) -> tuple[Family, ResolvedBatch, Precision]:
    """What the config and the world decide together, before anything is opened."""
    family: Family = resolve(FAMILIES, config.model.family, "model.family")
    if config.objective.name not in family.objectives:
        raise ConfigError("objective.name", f"{config.objective.name} does not train {family.name} models; "
                          f"use one of {', '.join(sorted(family.objectives))}")
    if not config.model.parameter_count().trainable:
        raise UserError(f"{config.name}: the model has nothing to train; evaluate it as it is with "
                        "`pretrain eval CONFIG`")
    return family, config.batch.resolve(world.size), choose_precision(config, world)


def choose_precision(config: RunConfig, world: World) -> Precision:
    """The precision of the run as this rank's hardware has it."""
    wanted = config.engine.precision
    if wanted == "fp16" and world.device.type != "cuda":
        raise ConfigError("engine.precision", "fp16 needs CUDA; use bf16 or fp32 here")
    if wanted != "auto":
        return wanted
    facts = device_facts([]) if world.device.type != "cuda" else DeviceFacts(
        "cuda", cuda_capability=torch.cuda.get_device_capability(world.device))
    precision, reason = advise_precision(facts, config.engine.zero_stage)
    _log.info("precision %s: %s", precision, reason)
    return precision


def prepare(loaded: LoadedConfig, world: World, claim: Claim, evaluators: Sequence[Evaluator], console: Console,
            signals: StopSignals | None = None) -> Trainer:
    """Everything between the claim on the run folder and the first step. Collective."""
    config = loaded.config
    world.all_or_none(lambda: check_changes(claim, config))
    world.all_or_none(lambda: check_evaluations(config, evaluators))
    family, batch, precision = world.all_or_none(lambda: choose(config, world))
    if "fp32" in world.gather_objects(precision):  # ranks on unequal hardware
        precision = "fp32"
    data = open_data(config, batch, world)
    start_k = world.all_or_none(lambda: check_data(claim, config, data))
    lengths = world.all_or_none(lambda: Lengths.of(config, batch, data.epoch_samples))
    if config.train.init_from and claim.resume is None:
        world.all_or_none(lambda: check_initial(Path(str(config.train.init_from)), data.source))
        world.on_main(lambda: tell_initial(loaded))
    rng.seed_all(config.seed, world.rank)
    told = partial(memory_told, config=config, batch=batch, precision=precision, world=world)
    with told("building the model"):
        model, ds_config, keepalive = build_model(config, family, batch, precision, world)
    if config.train.gates_at_start and claim.resume is None:
        world.all_or_none(lambda: _gates(config, model, world))
    hooks = family.hooks(config)
    if claim.resume is None:
        with told("preparing the first weights"):
            missing = load_initial_weights(model, config.train.init_from, partitioned=keepalive is not None,
                                           supplied=hooks.supplies)
            hooks.before_engine(FamilyStartContext(model, world, keepalive is not None, data, missing))
    with told("handing the model to DeepSpeed"):
        engine = build_engine(config, family, batch, precision, world, model, ds_config, keepalive)
    snapshot = None
    if claim.resume is not None:
        with told(f"loading {claim.resume.path}"):
            snapshot = checkpoint.load(engine, claim.resume, config.seed)
    world.on_main(lambda: take_over(loaded, claim, engine, lengths.total))
    trainer = _assemble(config, batch, world, claim, engine, family, data, hooks, evaluators, console, lengths, signals,
                        start_k=start_k or 0)
    if world.is_main:
        _log.info("%s: %s with %s parameters, %d ranks, ZeRO stage %d, %s; batch of %d samples = %d x %d x %d ranks; "
                  "%d steps, %s tokens", claim.folder.root, family.name, f"{config.model.parameter_count().total:,}",
                  world.size, engine.stage, precision, batch.global_batch_size, batch.micro_batch_size,
                  batch.gradient_accumulation_steps, batch.data_parallel_size, lengths.total,
                  f"{lengths.total * batch.global_batch_size * config.data.tokens_per_sample:,}")
        warning = config.model.summary().get("warning")
        for line in [*([warning] if warning else []), *never_counts(config, batch, lengths.total)]:
            _log.warning("%s", line)
    if snapshot is not None:
        _resume(trainer, snapshot, claim, start_k or 0)
    return trainer


def open_data(config: RunConfig, batch: ResolvedBatch, world: World) -> TrainingData:
    """Open the training data; rank 0 verifies for all before the others open it unverified. Collective."""
    data = world.all_or_none(lambda: open_training(config if world.is_main else _unverified(config), batch))
    fingerprints = world.gather_objects(data.fingerprint)
    if len(set(fingerprints)) > 1:
        other = next(r for r, f in enumerate(fingerprints) if f != fingerprints[0])
        raise UserError(f"data: rank {other} sees another dataset than rank 0 (fingerprint {fingerprints[other][:12]} "
                        f"against {fingerprints[0][:12]}); all nodes must read the same files")
    return data


def _unverified(config: RunConfig) -> RunConfig:
    """Hashing everything once is enough; `touch` stays, because every rank reads other shards first."""
    values = config.data.source.model_dump()
    if values.get("verify") not in ("full", "auto"):
        return config
    source = type(config.data.source).model_validate({**values, "verify": "off"})
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def open_loader(config: RunConfig, batch: ResolvedBatch, world: World, data: TrainingData,
                start_k: int) -> UpdateLoader:
    """The loader of this rank from update `start_k` on."""
    return UpdateLoader(data.source, data.order, batch, rank=world.rank, start_k=start_k, workers=config.data.workers,
                        prefetch=config.data.prefetch, pin_memory=world.device.type == "cuda")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Intervals of a run in optimizer updates."""

    total: int
    warmup: int
    decay: int
    keep_every: int | None

    @classmethod
    def of(cls, config: RunConfig, batch: ResolvedBatch, epoch_samples: int | None) -> Lengths:
        """Raises ConfigError for epochs of a source that has none."""

        def steps(key: str, interval: Interval | None) -> int:
            try:
                return 0 if interval is None else int(interval.to_steps(
                    micro_steps_per_step=batch.gradient_accumulation_steps, samples_per_step=batch.global_batch_size,
                    tokens_per_step=batch.global_batch_size * config.data.tokens_per_sample,
                    epoch_samples=epoch_samples))
            except ValueError as error:
                raise ConfigError(key, str(error)) from None

        total = steps("train.length", config.train.length)
        return cls(total, steps("schedule.warmup", config.schedule.warmup),
                   steps("schedule.decay", config.schedule.decay) or max(1, total // 10),
                   steps("checkpoint.keep_every", config.checkpoint.keep_every) or None)


def process_age() -> float:
    """Seconds since this process started: a time limit counts the start-up too."""
    return time.time() - psutil.Process().create_time()


def _assemble(config: RunConfig, batch: ResolvedBatch, world: World, claim: Claim, engine: Engine, family: Family,
              data: TrainingData, hooks: Hooks, evaluators: Sequence[Evaluator], console: Console, lengths: Lengths,
              signals: StopSignals | None, *, start_k: int) -> Trainer:
    steps = lengths.total
    lr = LearningRate(config.schedule, warmup_steps=lengths.warmup, decay_steps=lengths.decay, total_steps=steps)
    peak = config.monitor.peak_flops
    if peak is None and world.device.type == "cuda":
        tf32 = engine.precision == "fp32" and torch.backends.cuda.matmul.allow_tf32
        peak = peak_flops(torch.cuda.get_device_name(world.device), "tf32" if tf32 else engine.precision)
    writer = progress = None
    if world.is_main:
        assert claim.lease is not None
        wandb = WandbOptions(
            project=config.monitor.wandb_project, name=config.name, config=config.model_dump(mode="json")
        ) if config.monitor.wandb else None
        writer = MetricsWriter(claim.folder, family.csv_columns, config.monitor.tensorboard, wandb, claim.lease.fence)
        progress = Progress(config.monitor.progress, steps, console)

    def diagnose(row: Mapping[str, float]) -> None:
        for finding in family.diagnostics(engine.model, row):
            _log.warning("[DIAG:%s] %s | %s", finding.rule, finding.message, finding.remedy)

    reporter = Reporter(world, claim.folder, TimeShares(),
                        Throughput(total_steps=steps, flops_per_token=config.model.flops_per_token(config.data.seq_len),
                                   peak_flops=peak, devices=world.size), writer, progress, claim.status, diagnose)
    stop = StopRequests(claim.folder, signals, is_main=world.is_main, max_hours=config.train.max_hours,
                        started=time.monotonic() - process_age())
    profile = config.monitor.profile_steps
    open_at = partial(open_loader, config, batch, world, data)
    objective = resolve(OBJECTIVES, config.objective.name, "objective.name")(config.objective)
    return Trainer(
        config=config, batch=batch, engine=engine, objective=objective, hooks=hooks,
        loader=open_at(start_k), open_loader=open_at, evaluators=evaluators,
        lr=lr, state=RunState(), total_steps=steps, epoch_samples=data.epoch_samples, data_fingerprint=data.fingerprint,
        stop=stop, reporter=reporter,
        keeper=Keeper(claim.folder, claim.lease, config.checkpoint, lengths.keep_every, _mirror(config, claim, world)),
        health=Health(config.train.max_bad_steps, config.train.max_bad_per_1000, family.grad_warn),
        profiler=StepProfiler(claim.folder.profile_dir, *profile, world.rank) if profile else None)


def _mirror(config: RunConfig, claim: Claim, world: World) -> Mirror | None:
    wanted = config.checkpoint.mirror
    if wanted is None or wanted.path is None or not world.is_main:
        return None
    return Mirror(claim.folder, Path(wanted.path), wanted.every)


def _resume(trainer: Trainer, snapshot: Snapshot, claim: Claim, start_k: int) -> None:
    """Everything beside weights, moments and the loader, which are there already; then what a changed config means."""
    trainer.restore(snapshot)
    changed = {key for key, *_ in claim.changes}
    if claim.begins_branch or any(rule_of(key, trainer.config) is JUDGED for key in changed):
        trainer.state.judge_anew()
        trainer.lr.judge_anew()
    if claim.begins_branch:
        trainer.state.rewinds = []
    if changed & REOPENS:
        trainer.state.stopped_early = None
    if "optim.lr" in changed:
        trainer.state.lr_override = None
    if trainer.state.k != start_k:  # numbers of batches of other data mean nothing here
        trainer.state.k = start_k
        trainer.health.bad_steps.forget()
    if trainer.engine.world.is_main:
        assert claim.resume is not None
        if not claim.begins_branch:
            trainer.keeper.catch_up(claim.resume, trainer.state, trainer.config.eval.metric)
        _log.info("resumed from %s: step %d, batch %d", claim.resume.path, trainer.state.step, trainer.state.k)
        if trainer.state.lr_override is not None:
            _log.info("the learning rate is %g, as control/reload_lr set it, not optim.lr", trainer.state.lr_override)


def _gates(config: RunConfig, model: PreTrainedModel, world: World) -> None:
    from pretrain.gates import run_gates
    failed = [r for r in run_gates(model, vocab_size=config.model.vocab_size, seq_len=min(256, config.data.seq_len),
                                   seed=config.seed, device=world.device) if not r.passed]
    if failed:
        raise CheckFailed("; ".join(f"gate {r.name}: {r.message}" for r in failed))
