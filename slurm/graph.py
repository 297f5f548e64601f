"""Graphs of jobs: data preparation, training, evaluation and report; sweeps; evaluations of new checkpoints.

Single jobs and arrays go through submitit; training is the sbatch file of `slurm.script`, because its signals and
restarts are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig
from data_prep.pipeline import is_complete
from pretrain.config.load import LoadedConfig, load_yaml_model
from pretrain.config.slurm import SlurmConfig
from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder
from slurm.client import require_programs
from slurm.script import Place, quoted
from slurm.submit import submit
from slurm.tasks import Commands, NewEvaluations, new_checkpoints, note_evaluated, write_report


@dataclass(frozen=True, slots=True)
class Stage:
    """One node of a graph."""

    name: str
    job: str
    after: str | None
    """Job whose success it waits for."""


class Jobs:
    """Submits functions as jobs with the account, partition and environment of a slurm section. One machine each."""

    def __init__(self, slurm: SlurmConfig, place: Place, folder: Path) -> None:
        self._slurm, self._place, self._folder = slurm, place, folder

    def submit(self, name: str, function: Any, arguments: Sequence[tuple[Any, ...]], *, after: str | None = None,
               at_once: int = 256, gpus: int = 0, even_failed: bool = False) -> str:
        """The number of a job that calls `function` once for each of `arguments`: an array, if there are several.

        Raises UserError where submitit is not installed, or what sbatch said.
        """
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError("submitit is not installed; it is in the extra [slurm]") from None
        slurm = self._slurm
        extra: dict[str, Any] = {"export": "NONE", "kill-on-invalid-dep": "yes"}
        for key in ("reservation", "constraint"):
            if getattr(slurm, key):
                extra[key] = getattr(slurm, key)
        if after:
            extra["dependency"] = f"{'afterany' if even_failed else 'afterok'}:{after}"
        require_programs("sbatch", "srun")
        executor = submitit.SlurmExecutor(folder=str(self._folder), max_num_timeout=slurm.max_restarts,
                                          python=quoted(slurm.python or self._place.python))
        executor.update_parameters(
            job_name=name, time=max(1, slurm.time_seconds // 60), nodes=1, ntasks_per_node=1,
            array_parallelism=at_once, additional_parameters=extra, setup=self._setup(),
            **{key: value for key, value in (
                ("partition", slurm.partition), ("account", slurm.account), ("qos", slurm.qos), ("mem", slurm.mem),
                ("cpus_per_task", slurm.cpus), ("gpus_per_node", gpus or None),
                ("exclude", ",".join(slurm.exclude) or None)) if value is not None})
        try:
            jobs = executor.map_array(function, *zip(*arguments, strict=True)) if len(arguments) > 1 else \
                [executor.submit(function, *arguments[0])]
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch: {str(error).strip().splitlines()[-1]}") from error
        return str(jobs[0].job_id).split("_")[0]

    def _setup(self) -> list[str]:
        lines = ["unset SLURM_EXPORT_ENV", "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1"]
        lines += [f"module load {quoted(module)}" for module in self._slurm.modules]
        return [*lines, *(f"export {name}={quoted(value)}" for name, value in self._slurm.env.items())]


def section_of(loaded: LoadedConfig) -> SlurmConfig:
    """The slurm section. Raises UserError where there is none."""
    if loaded.config.slurm is None:
        raise UserError("slurm: is missing; a section with at least a time is needed for a job")
    return loaded.config.slurm


def prepare_data(jobs: Jobs, place: Place, prep: Path, shares: int, at_once: int) -> list[Stage]:
    """Read in shares, encode in shares, merge. What is kept depends on everything that is read: hence two rounds."""
    work_dir, stages, after = str(place.work_dir), [], None
    for name in ("prep-read", "prep-encode"):
        arguments = [([["prep", str(prep), "--rank", str(rank), "--of", str(shares)]], work_dir)
                     for rank in range(shares)]
        stages.append(Stage(name, jobs.submit(name, Commands(), arguments, after=after, at_once=at_once), after))
        after = stages[-1].job
    merge = jobs.submit("prep-merge", Commands(), [([["prep", str(prep)]], work_dir)], after=after)
    return [*stages, Stage("prep-merge", merge, after)]


def after_training(jobs: Jobs, place: Place, root: str, train: str, evaluate: Sequence[Sequence[str]],
                   gpus: int) -> list[Stage]:
    """Evaluate the finished run, then write its report."""
    work_dir = str(place.work_dir)
    commands = [["eval", root, *words] for words in evaluate] or [["eval", root]]
    done = jobs.submit("eval", Commands(), [(commands, work_dir)], after=train, gpus=gpus)
    report = jobs.submit("report", write_report, [(root,)], after=done)
    return [Stage("eval", done, train), Stage("report", report, done)]


def pipeline(loaded: LoadedConfig, place: Place, *, prep: Path | None, shares: int, at_once: int,
             evaluate: Sequence[Sequence[str]], with_dependency: Any) -> list[Stage]:
    """Preparation, training (which requeues itself), evaluation and report as one graph.

    `with_dependency` gives the config anew, with a job to wait for. Data that is complete is not prepared again. Raises
    UserError, and ConfigError for a config of the preparation that is none.
    """
    slurm = section_of(loaded)
    wanted = prep is not None and not is_complete(load_yaml_model(PrepConfig, prep)[0])
    root = Path(place.work_dir, loaded.config.runs_dir, loaded.config.name)
    jobs = _jobs_of(RunFolder.create(root), slurm, place)
    stages = prepare_data(jobs, place, prep, shares, at_once) if prep is not None and wanted else []
    merged = stages[-1].job if stages else None
    job, numbers = submit(with_dependency(merged) if merged else loaded, place)
    stages.append(Stage("train", numbers[-1], merged))
    return [*stages, *after_training(jobs, place, job.root, numbers[-1], evaluate, min(1, slurm.gpus_per_node))]


def evaluate_new(folder: RunFolder, slurm: SlurmConfig, place: Place, words: Sequence[str], *,
                 at_once: int) -> tuple[str | None, list[int]]:
    """Evaluate the checkpoints that no earlier call has, as an array. Its number and the steps; None for none."""
    refs = new_checkpoints(folder)
    if not refs:
        return None, []
    arguments = [([["eval", str(folder.root), "--step", str(ref.step), *words]], str(place.work_dir)) for ref in refs]
    job = _jobs_of(folder, slurm, place).submit("eval-new", Commands(), arguments, at_once=at_once,
                                                gpus=min(1, slurm.gpus_per_node))
    note_evaluated(folder, refs)
    return job, [ref.step for ref in refs]


def evaluate_after(folder: RunFolder, slurm: SlurmConfig, place: Place, words: Sequence[str], after: str) -> str:
    """A job that waits for the success of job `after` and evaluates the checkpoints that are new by then."""
    return _jobs_of(folder, slurm, place).submit(
        "eval-new", NewEvaluations(), [(str(folder.root), list(words), str(place.work_dir))], after=after,
        gpus=min(1, slurm.gpus_per_node))


def _jobs_of(folder: RunFolder, slurm: SlurmConfig, place: Place) -> Jobs:
    """Jobs whose files lie in a run folder."""
    target = folder.slurm_dir / "submitit"
    target.mkdir(parents=True, exist_ok=True)
    return Jobs(slurm, place, target)
