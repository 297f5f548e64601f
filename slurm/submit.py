"""From a config to jobs in the queue: freeze the config, write the sbatch file, hand it to sbatch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.config.load import LoadedConfig, dump_yaml
from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_text_atomic
from slurm import client
from slurm.history import note_submission, read_submissions
from slurm.script import Job, Place, frozen_config, render, script_file


def here() -> Place:
    """The present folder and interpreter."""
    return Place(Path(os.getcwd()), sys.executable)


def write_job(loaded: LoadedConfig, place: Place, command: Sequence[str] | None = None) -> Job:
    """Write the frozen config and the sbatch file into the run folder, ready for `sbatch`. Raises ConfigError.

    `command`: what each rank runs, in place of training; it finds the frozen config by `frozen_config`.
    """
    job = Job.of(loaded.config, place)
    text = render(job, command)
    folder = RunFolder.create(Path(job.root))
    (folder.slurm_dir / "log").mkdir(parents=True, exist_ok=True)
    write_text_atomic(frozen_config(folder), dump_yaml(loaded))
    write_text_atomic(script_file(folder), text)
    return job


def submit(loaded: LoadedConfig, place: Place, *, again: bool = False, command: Sequence[str] | None = None
           ) -> tuple[Job, list[str]]:
    """Write and submit. The job, and the numbers it got: one, or those of a chain.

    Raises UserError where a job of this run waits or runs already, unless `again`.
    """
    folder = Job.of(loaded.config, place).folder
    waiting = live_jobs(folder)
    if waiting and not again:
        raise UserError(f"{folder.root}: job {', '.join(waiting)} of this run waits or runs already; cancel it with "
                        f"`pretrain slurm cancel {folder.root}`")
    job = write_job(loaded, place, command)
    links = 1 + job.slurm.max_restarts if job.slurm.restart == "chain" else 1
    numbers: list[str] = []
    try:
        for _ in range(links):
            after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
            numbers.append(client.sbatch(script_file(job.folder), after))
    finally:
        if numbers:
            note_submission(job.folder, numbers)
    return job, numbers


def await_end(number: str, timeout_s: float) -> str:
    """The state of a job once it has ended, or as it is after `timeout_s` seconds; UNKNOWN if the queue forgot it."""
    deadline = time.monotonic() + timeout_s
    while True:
        job = next((job for job in client.squeue() if job.id == number), None)
        if job is None or not job.live or time.monotonic() > deadline:
            return job.state if job is not None else "UNKNOWN"
        time.sleep(2.0)


def live_jobs(folder: RunFolder) -> list[str]:
    """Jobs of this run that wait or run."""
    known = {number for sent in read_submissions(folder) for number in sent.jobs}
    return [job.id for job in client.squeue() if job.live and (job.root == str(folder.root) or job.id in known)]
