"""`pretrain demo`: the whole way on this machine, with the same commands a user would type."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import LogLevel, LogLevelOption, SetOption
from pretrain.errors import CheckFailed, PretrainError


def demo(*, sets: SetOption,
         nproc: Annotated[int, typer.Option(min=1, help="Processes to train on.")] = 2,
         log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Prepare the standard library's own source, train a 3M Llama on 2 processes, evaluate, export, report.

    Works in the current folder (`data/stdlib`, `runs/demo`), under 8 minutes on 2 cores. What is finished is not done
    again. Exit code 5 where the model loses to a bigram trained on the same number of tokens.
    """
    from data_prep.config import PrepConfig
    from data_prep.pipeline import prepare
    from data_prep.progress import RichReporter
    from pretrain.cli.options import load_config
    from pretrain.config.load import load_yaml_model
    from pretrain.config.presets import configs_dir

    started = time.monotonic()
    loaded = load_config(None, "demo", [*sets, f"launch.nproc={nproc}"])
    run = Path(loaded.config.runs_dir) / loaded.config.name
    _say("pretrain prep configs/prep/stdlib.yaml")
    prep_config, _ = load_yaml_model(PrepConfig, configs_dir() / "prep" / "stdlib.yaml")
    prepare(prep_config, reporter=RichReporter())
    _run(["train", "--preset", "demo", f"--log-level={log_level.value}", *(a for s in [*sets, f"launch.nproc={nproc}"]
                                                                          for a in ("--set", s))])
    _run(["eval", str(run), "--baselines", "--samples", "4"])
    export = run / "export" / "demo"
    _run(["export", str(run), "--out", str(export), "--overwrite"])
    from rich.console import Console

    from evaluation.demo_table import demo_outcome
    from evaluation.report import write_report
    write_report(run)
    outcome = demo_outcome(run, export)
    console = Console()
    console.print(outcome.table)
    console.print(f"{outcome.message} ({time.monotonic() - started:.0f} s in all)")
    if not outcome.passed:
        raise CheckFailed(outcome.message)


def _say(command: str) -> None:
    typer.secho(f"\n$ {command}", bold=True)


def _run(arguments: list[str]) -> None:
    """One command of ours in a fresh process; its failure is ours. Raises PretrainError with its exit code."""
    import subprocess

    from pretrain.engine.launcher import worker_command
    from pretrain.errors import ExitCode
    _say(shlex.join(["pretrain", *arguments]))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    code = subprocess.run(worker_command("pretrain.cli.main", *arguments), env=environment, check=False).returncode
    if code:
        error = PretrainError(f"pretrain {arguments[0]} ended with exit code {code}; see its lines above")
        error.code = ExitCode(code) if code in list(ExitCode) else ExitCode.INTERNAL
        raise error
