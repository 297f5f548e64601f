"""The programs of Slurm, as subprocesses. What they say is data; what they refuse becomes one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import UserError
from slurm.jobs import QueuedJob, parse_jobs

_TIMEOUT_S = 120.0


def sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a file; the number of the job. Raises UserError with what sbatch said."""
    answer = _run(["sbatch", "--parsable", *options, str(script)]).strip()
    job = answer.splitlines()[-1].split(";")[0] if answer else ""
    if not job.isdigit():
        raise UserError(f"sbatch: answered {answer!r}, where the number of a job was expected")
    return job


def squeue() -> list[QueuedJob]:
    """Every job that the controller knows, those that ended not long ago included."""
    return parse_jobs(_run(["squeue", "--json", "--states=all"]))


def scancel(jobs: Sequence[str]) -> None:
    """End jobs; one that has ended already is no error."""
    if jobs:
        _run(["scancel", *jobs])


def require_programs(*names: str) -> None:
    """Raise UserError where a program of Slurm is not on PATH."""
    for name in names:
        if shutil.which(name) is None:
            raise UserError(f"{name}: not found on PATH; is this a machine of the cluster?")


def _run(command: Sequence[str]) -> str:
    require_programs(command[0])
    # These variables beat the header of the sbatch file that was reviewed, and filter what squeue shows.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SQUEUE_"))}
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
                              env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {_TIMEOUT_S:.0f} s; is the controller up?") from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{' '.join(command[:2])}: {told[-1].strip() if told else f'exit code {done.returncode}'}")
    return done.stdout
