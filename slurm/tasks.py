"""What single jobs of a graph do. submitit pickles references to what stands here, so it stays importable."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.publish import write_json_atomic


class Commands:
    """Runs `pretrain` commands one after another; the first that fails fails the job.

    A job that reaches its time limit or is preempted is put back into the queue by submitit and runs the same commands
    again. Each of them goes on where it was.
    """

    def __call__(self, commands: Sequence[Sequence[str]], work_dir: str) -> None:
        """Run them in `work_dir`."""
        for words in commands:
            print(f"$ {shlex.join(['pretrain', *words])}", flush=True)
            # Slurm signals all processes of a job; what SIGUSR2 means to submitit would just kill the command.
            done = subprocess.run([sys.executable, "-P", "-m", "pretrain.cli.main", *words], cwd=work_dir, check=False,
                                  preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
            if done.returncode:
                raise SystemExit(done.returncode)

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit is to run when the job starts again."""
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self, *arguments)


class NewEvaluations(Commands):
    """Evaluates, one after another, the checkpoints that are new when the job starts."""

    def __call__(self, root: str, words: Sequence[str], work_dir: str) -> None:  # type: ignore[override]
        """`words`: further arguments of `pretrain eval`."""
        folder = RunFolder(Path(root))
        for ref in new_checkpoints(folder):
            super().__call__([["eval", root, "--step", str(ref.step), *words]], work_dir)
            note_evaluated(folder, [ref])


def new_checkpoints(folder: RunFolder) -> list[CheckpointRef]:
    """Checkpoints that have not been given to an evaluation, oldest first."""
    known = _evaluated(folder)
    return sorted((ref for ref in folder.checkpoints() if ref.path.name not in known), key=lambda ref: ref.step)


def note_evaluated(folder: RunFolder, refs: Sequence[CheckpointRef]) -> None:
    """Write down that these checkpoints have been given to an evaluation."""
    write_json_atomic(_record(folder), sorted(_evaluated(folder) | {ref.path.name for ref in refs}))


def _record(folder: RunFolder) -> Path:
    return folder.slurm_dir / "evaluated.json"


def _evaluated(folder: RunFolder) -> set[str]:
    return set(json.loads(_record(folder).read_text())) if _record(folder).exists() else set()


def write_report(root: str) -> None:
    """Write report.html of a run."""
    from evaluation.report import write_report as write
    write(Path(root))
