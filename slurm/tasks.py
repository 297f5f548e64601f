"""What single jobs of a graph do. submitit pickles references to these functions, so they stay importable."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence


def run_commands(commands: Sequence[Sequence[str]], work_dir: str) -> None:
    """Run `pretrain` commands one after another in `work_dir`; the first that fails fails the job."""
    for words in commands:
        print(f"$ {shlex.join(['pretrain', *words])}", flush=True)
        done = subprocess.run([sys.executable, "-P", "-m", "pretrain.cli.main", *words], cwd=work_dir, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def write_report(root: str) -> None:
    """Write report.html of a run."""
    from pathlib import Path

    from evaluation.report import write_report as write
    write(Path(root))
