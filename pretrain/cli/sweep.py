"""`pretrain sweep`."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import JsonOption, SetOption
from pretrain.errors import CheckFailed, ExitCode, PretrainError, UserError

if TYPE_CHECKING:
    from pretrain.config.sweep import SweepConfig, SweepRun

_POLL_S = 0.2


def sweep(file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file of the sweep.")], *, sets: SetOption,
          jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
          table: Annotated[bool, typer.Option("--table", help="Run nothing; the table of what is finished.")] = False,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and what would be done.")] = False,
          as_json: JsonOption = False) -> None:
    """Train presets x variants x seeds, evaluate them, and put them into one table with paired differences.

    The same command goes on where it was stopped: what is finished is left alone. A run that fails is told in the table
    and does not stop the others. Exit codes: 0 all done, 2 bad input, 5 some run failed, 85 stopped on request.
    """
    from pretrain.config.load import load_run_config, load_yaml_model
    from pretrain.config.sweep import SweepConfig
    config, _ = load_yaml_model(SweepConfig, file, sets)
    runs = config.runs()
    for run in runs:
        load_run_config(run.target, run.sets)  # everything that is wrong with any of them is told before the first
    if dry_run:
        for run in runs:
            print(f"{_state(config, run):12} pretrain train {shlex.join(_arguments(run))}")
        return
    folder = Path(config.runs_dir) / config.name
    stopped = False
    if not table:
        folder.mkdir(parents=True, exist_ok=True)
        stopped = _Pool(config, folder, jobs).run(runs)
    states = {run.name: _state(config, run) for run in runs}
    try:
        _show(config, folder, runs, states, as_json=as_json)
    except UserError:
        if not stopped:  # what the table shows may come from evaluations that the stop prevented
            raise
    if stopped:
        raise typer.Exit(int(ExitCode.STOPPED))
    failed = [name for name, state in states.items() if state != "done"]
    if failed and not table:
        raise CheckFailed(f"{file}: {len(failed)} of {len(runs)} runs are not done: {', '.join(failed)}; their output "
                          f"is in {folder}/*.log")


def _show(config: SweepConfig, folder: Path, runs: list[SweepRun], states: dict[str, str], *, as_json: bool) -> None:
    from rich.console import Console

    from evaluation.sweep import run_figures, run_lower_bounds, sweep_cells, sweep_table, write_sweep
    done = [run.name for run in runs if states[run.name] == "done"]
    finished = {name: run_figures(folder / name, config.at) for name in done}
    cells = sweep_cells(config, finished, {name: run_lower_bounds(folder / name, config.at) for name in done})
    if folder.is_dir():
        write_sweep(folder, config, cells, states)
    if as_json:
        print((folder / "sweep.json").read_text())
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # in a pipe rich would cut at 80
    console.print(sweep_table(config, cells))


def _arguments(run: SweepRun) -> list[str]:
    return [run.target, *(word for value in run.sets for word in ("--set", value))]


def _state(config: SweepConfig, run: SweepRun) -> str:
    """How the run stands: `done`, another verdict, `changed` where it was made with other values, or `new`."""
    from pretrain.config.load import diff_configs, load_run_config
    from pretrain.runfolder.layout import RunFolder
    from pretrain.runfolder.status import Status
    folder = RunFolder(Path(config.runs_dir) / config.name / run.name)
    try:
        status = Status.read(folder) if folder.root.is_dir() else None
        if status is None:
            return "new"
        if status.state == "done" and diff_configs(load_run_config(folder.config_file),
                                                   load_run_config(run.target, run.sets)):
            return "changed"
    except PretrainError as error:
        return f"unreadable: {error}"
    return status.state


@dataclass
class _Task:
    """What remains to be done for one run, and the process that does the next of it."""

    run: SweepRun
    commands: list[list[str]]
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


class _Pool:
    """Runs up to `jobs` runs at a time. SIGINT and SIGTERM are passed on: runs save and stop, and so does the sweep."""

    def __init__(self, config: SweepConfig, folder: Path, jobs: int) -> None:
        self._config, self._folder, self._jobs = config, folder, jobs
        self._active: list[_Task] = []
        self._stopping = False

    def run(self, runs: list[SweepRun]) -> bool:
        """Do all that is not done yet. True where it was stopped on request."""
        previous = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            waiting = [(number, run) for number, run in enumerate(runs, 1)]
            total = len(runs)
            while (waiting and not self._stopping) or self._active:
                while waiting and not self._stopping and len(self._active) < self._jobs:
                    number, run = waiting.pop(0)
                    self._start(run, f"[{number}/{total}]")
                self._poll()
                time.sleep(_POLL_S if self._active else 0)
        finally:
            for task in self._active:
                task.process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._stopping

    def _start(self, run: SweepRun, place: str) -> None:
        commands = [] if _state(self._config, run) == "done" else [["train", *_arguments(run)]]
        commands += [command for command in self._evaluations(run) if commands or not self._evaluated(run, command)]
        if not commands:
            print(f"{place} {run.name}: done before", flush=True)
            return
        print(f"{place} {run.name}: {'training' if commands[0][0] == 'train' else 'evaluating'}", flush=True)
        self._active.append(_Task(run, commands[1:], self._spawn(run, commands[0])))

    def _evaluations(self, run: SweepRun) -> list[list[str]]:
        return [["eval", str(self._folder / run.name), *words] for words in self._config.evaluations(run)]

    def _evaluated(self, run: SweepRun, command: list[str]) -> bool:
        """Whether the same command has left its results."""
        from evaluation.report_data import read_results
        told = shlex.join(["pretrain", *command])
        return any(results.command == told for results in read_results(self._folder / run.name / "eval"))

    def _spawn(self, run: SweepRun, command: list[str]) -> subprocess.Popen[bytes]:
        from pretrain.engine.launcher import worker_command
        with (self._folder / f"{run.name}.log").open("ab") as log:
            log.write(f"$ {shlex.join(['pretrain', *command])}\n".encode())
            log.flush()
            return subprocess.Popen(worker_command("pretrain.cli.main", *command), stdin=subprocess.DEVNULL,
                                    stdout=log, stderr=subprocess.STDOUT, process_group=0)

    def _poll(self) -> None:
        for task in list(self._active):
            code = task.process.poll()
            if code is None:
                continue
            self._active.remove(task)
            if code == int(ExitCode.STOPPED):
                self._stopping = True
            if code == 0 and task.commands and not self._stopping:
                self._active.append(_Task(task.run, task.commands[1:], self._spawn(task.run, task.commands[0]),
                                          task.started))
                continue
            minutes = (time.monotonic() - task.started) / 60
            verdict = "done" if code == 0 else f"ended with code {code}; see {self._folder / task.run.name}.log"
            print(f"    {task.run.name}: {verdict} ({minutes:.1f} min)", flush=True)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for task in self._active:
            task.process.send_signal(number)
