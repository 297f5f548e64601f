"""`pretrain train`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import ConfigArgument, LogLevel, LogLevelOption, PresetOption, SetOption, load_config
from pretrain.config.load import LoadedConfig
from pretrain.config.run import RunConfig
from pretrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pretrain.engine.evaluator import Evaluator


def train(config: ConfigArgument = None, preset: PresetOption = None, *, sets: SetOption,
          nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this machine (launch.nproc).")] = None,
          branch: Annotated[str | None, typer.Option("--branch", metavar="NAME", show_default=False, help="Train run "
                            "NAME, which begins at a checkpoint of the config's run, or go on with it.")] = None,
          from_step: Annotated[str | None, typer.Option("--from-step", metavar="N", show_default=False, help="With "
                               "--branch: step to begin at, or best-METRIC; default: the newest checkpoint.")] = None,
          no_launcher: Annotated[bool, typer.Option("--no-launcher", help="Train in this process, as the only rank: "
                                                    "for notebooks and debuggers.")] = False,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and touch nothing.")] = False,
          log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Train, or go on with, the run that a config describes.

    Alone it starts `launch.nproc` ranks on this machine, or with --no-launcher none but itself. Under srun, torchrun or
    deepspeed the same command is one rank of theirs. Exit codes: 0 done, 2 bad input, 3 corrupt data, 4 diverged,
    5 a check failed, 6 hang, 85 stopped on request and resumable by the same command.
    """
    if nproc is not None:
        sets = [*sets, f"launch.nproc={nproc}"]
    from pretrain.engine.launcher import launch, worker_command
    from pretrain.engine.ranks import ALONE, rank_environment
    from pretrain.engine.stopping import StopSignals
    if no_launcher:
        if nproc not in (None, 1) or rank_environment(os.environ) is not None:
            raise UserError("--no-launcher: trains in one process, without --nproc and without another launcher")
        sets = [*sets, "launch.nproc=1"]
        os.environ.update({} if dry_run else ALONE)
    own = rank_environment(os.environ) if not dry_run else None
    signals = StopSignals.installed(is_main=own.rank == 0) if own is not None else None
    loaded = load_config(config, preset, sets)
    parent = loaded.config.name
    if branch is not None:
        loaded = _as_branch(load_config(config, preset, [*sets, f"name={json.dumps(branch)}"]))
    elif from_step is not None:
        raise UserError("--from-step belongs to --branch NAME; a run itself goes on from its newest checkpoint")
    settings = loaded.config.launch
    if dry_run:
        from pretrain.cli.dry_run import dry_run as show
        show(loaded, settings.nproc)
        return
    if own is None or signals is None:
        loaded.config.batch.resolve(settings.nproc)
        command = worker_command("pretrain.cli.main", *sys.argv[1:])
        raise typer.Exit(launch(command, settings.nproc, port=settings.port, threads=settings.threads))
    if no_launcher and settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if log_level is not LogLevel.DEBUG:  # read when torch is imported: where a rank dies, the others print C++ frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pretrain.engine.claim import BranchRequest
    from pretrain.engine.run import run_rank
    run_rank(loaded, own, signals, evaluators, log_level=log_level.value, after=report,
             branch=BranchRequest(parent, from_step) if branch is not None else None)


def _as_branch(loaded: LoadedConfig) -> LoadedConfig:
    """The config of a branch, with the origin of its name. Raises ConfigError where it would start afresh."""
    if loaded.config.train.resume == "never":
        raise ConfigError("train.resume", "never starts afresh, but --branch goes on from a checkpoint; leave one out")
    return replace(loaded, origins={**loaded.origins, "name": "--branch"})


def evaluators(config: RunConfig) -> Sequence[Evaluator]:
    """What a run evaluates in training: needles where it trains on them, else perplexity and texts; of encoders, what
    their vectors are worth. Only where there is a validation split.
    """
    from pathlib import Path

    from evaluation.embedding_training import EmbeddingEvaluator
    from evaluation.needle import NeedleEvaluator
    from evaluation.perplexity import PerplexityEvaluator
    from evaluation.phase import PhaseEvaluator, measures_phases
    from evaluation.samples import SamplesEvaluator
    from pretrain.data.needle import NeedleSource
    from pretrain.data.open import open_validation
    from pretrain.data.pairs import PairSource
    from pretrain.runfolder.layout import RunFolder
    source = open_validation(config)
    if source is None:
        return []
    found: list[Evaluator] = []
    if config.model.kind == "encoder":
        return [EmbeddingEvaluator(config.eval.every, config.eval.embedding)] if isinstance(source, PairSource) else []
    if isinstance(source, NeedleSource):
        found.append(NeedleEvaluator(config.eval.every, config.eval.max_batches))
    if not isinstance(source, NeedleSource) or not source.config.needle_query:
        found.append(PerplexityEvaluator(config.eval.every, config.eval.max_batches))
    if measures_phases(config):
        found.append(PhaseEvaluator(config.eval.every))
    if config.eval.samples:
        eval_dir = RunFolder(Path(config.runs_dir) / config.name).eval_dir
        found.append(SamplesEvaluator(config.eval.every, config.eval.samples, eval_dir))
    return found


def report(loaded: LoadedConfig) -> None:
    """Write report.html of a finished run; metrics.json too, where its family declares columns of metrics.csv."""
    from pathlib import Path

    from evaluation.report import write_report
    from evaluation.summary import write_summary
    from pretrain.config.registry import FAMILIES, resolve
    run = Path(loaded.config.runs_dir) / loaded.config.name
    write_report(run)
    if resolve(FAMILIES, loaded.config.model.family, "model.family").csv_columns:
        write_summary(run)
