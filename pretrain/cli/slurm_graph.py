"""`pretrain slurm pipeline`, `sweep` and `eval-new`: several jobs that wait for each other."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import ConfigArgument, PresetOption, SetOption, load_config

AtOnceOption = Annotated[int, typer.Option("--at-once", min=1, help="Jobs of an array that run at a time.")]
EvaluateOption = Annotated[list[str], typer.Option("--evaluate", metavar="ARGUMENTS", show_default=False,
                                                   default_factory=list, help="Arguments of `pretrain eval RUN ...`.")]


def pipeline(sets: SetOption, evaluate: EvaluateOption, config: ConfigArgument = None, preset: PresetOption = None,
             prep: Annotated[Path | None, typer.Option(help="Config of `pretrain prep`; default: none.")] = None,
             shares: Annotated[int, typer.Option(min=1, help="Jobs that prepare the data.")] = 4,
             at_once: AtOnceOption = 64) -> None:
    """Submit preparation, merge, training (which requeues itself), evaluation and report as one graph.

    Where the dataset of --prep is complete already, training is the first stage.
    """
    from slurm.graph import pipeline as submit_graph
    from slurm.submit import here
    loaded = load_config(config, preset, sets)
    stages = submit_graph(
        loaded, here(), prep=prep, shares=shares, at_once=at_once, evaluate=[shlex.split(line) for line in evaluate],
        with_dependency=lambda job: load_config(config, preset, [*sets, f"slurm.dependency=afterok:{job}"]))
    for stage in stages:
        typer.echo(f"{stage.name:<12}job {stage.job}{f' after {stage.after}' if stage.after else ''}")


def sweep(file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file of the sweep.")], *, sets: SetOption,
          at_once: AtOnceOption = 8) -> None:
    """Submit the runs of a sweep as an array, a run a machine, and its table once they have ended.

    Every run takes the resources of the slurm section of the sweep's first run.
    """
    from pretrain.config.load import load_run_config, load_yaml_model
    from pretrain.config.sweep import SweepConfig
    from slurm.graph import Jobs, section_of
    from slurm.submit import here
    from slurm.tasks import Commands
    config, _ = load_yaml_model(SweepConfig, file, sets)
    runs, place = config.runs(), here()
    configs = [load_run_config(run.target, run.sets) for run in runs]  # what is wrong with any is told before the first
    slurm = section_of(configs[0])
    ranks = [] if config.nproc else ["--nproc", str(max(slurm.ranks_per_node, configs[0].config.launch.nproc))]
    root = (Path(config.runs_dir) / config.name).resolve()
    folder = root / "submitit"
    folder.mkdir(parents=True, exist_ok=True)
    jobs, work_dir = Jobs(slurm, place, folder), str(place.work_dir)
    arguments = [([["train", run.target, *ranks, *(word for value in run.sets for word in ("--set", value))],
                   *(["eval", str(root / run.name), *words] for words in config.evaluations(run))], work_dir)
                 for run in runs]
    array = jobs.submit(f"sweep-{config.name}", Commands(), arguments, at_once=at_once, gpus=slurm.gpus_per_node)
    words = ["sweep", str(file), "--table", *(word for value in sets for word in ("--set", value))]
    table = jobs.submit("sweep-table", Commands(), [([words], work_dir)], after=array, even_failed=True)
    typer.echo(f"runs        job {array}: {len(runs)}, at most {at_once} at a time")
    typer.echo(f"table       job {table} after {array}")


def eval_new(run: Annotated[Path, typer.Argument(help="Run folder.")], *, evaluate: EvaluateOption,
             at_once: AtOnceOption = 8,
             after: Annotated[str | None, typer.Option(help="Job to wait for; one job then evaluates, one after "
                                                       "another, what is new by then.")] = None) -> None:
    """Submit evaluations of the checkpoints that no earlier call has evaluated, as an array."""
    from pretrain.config.load import load_run_config
    from pretrain.runfolder.layout import RunFolder
    from slurm.graph import evaluate_after, evaluate_new, section_of
    from slurm.script import frozen_config
    from slurm.submit import here
    folder = RunFolder.open(run.resolve())
    frozen = frozen_config(folder)
    slurm = section_of(load_run_config(frozen if frozen.exists() else folder.config_file))
    words = shlex.split(" ".join(evaluate))
    if after is not None:
        typer.echo(f"eval-new    job {evaluate_after(folder, slurm, here(), words, after)} after {after}: checkpoints "
                   "that are new by then")
        return
    job, steps = evaluate_new(folder, slurm, here(), words, at_once=at_once)
    typer.echo(f"eval-new    job {job}: steps {', '.join(map(str, steps))}" if job else "no checkpoint is new")
