"""Other packages to measure beside ours, in an environment of their own: nothing of theirs gets into this one.

The environment is a virtual environment in a temporary folder. It sees what is installed here behind what is installed
in it, so that torch is the same one. Measurements run in a process of that environment and are asked for line by line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WORKER = Path(__file__).with_name("peer_worker.py")


def make_environment(folder: Path, requirements: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """A virtual environment in `folder` with `requirements`, and `alone` without what they depend on. Its interpreter.

    Raises RuntimeError with what pip said.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for words in (list(requirements), ["--no-deps", *alone] if alone else []):
        if not words:
            continue
        done = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
                               "--no-compile", "--disable-pip-version-check", *words],
                              capture_output=True, text=True, timeout=1200, check=False)
        if done.returncode:
            raise RuntimeError(f"pip: {done.stderr[-2000:]}")
    return python


class Peer:
    """A process of such an environment that answers one question at a time. Use as a context manager."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def __enter__(self) -> Self:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([str(self._python), "-P", str(WORKER)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def ask(self, task: str, **values: Any) -> dict[str, Any]:
        """What the worker's function `task` returns. Raises RuntimeError with its traceback."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{task}: the process of the other packages has ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
