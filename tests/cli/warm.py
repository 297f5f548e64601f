"""Ranks without the seconds that imports take: one process imports everything once and forks a rank for each request.

What is left out is the start of the interpreter; from `pretrain.cli.main.main` on a forked rank runs the real command.
With several ranks the real launcher runs in a forked process too, and forks its ranks where it would have started them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.engine.stopping import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[2]
LATE = ("torch._dynamo.backends.debugging", "torch._dynamo.testing", "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer", "evaluation.perplexity", "evaluation.report_page")
"""What a run imports on the way; each costs time only, whether it is found here or not."""


@dataclass
class Forked:
    """A running command."""

    server: Warm
    pid: int
    stderr_file: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def wait(self, timeout_s: float = 60.0) -> int:
        """Exit code; a process that outlives `timeout_s` is killed and fails the test."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout_s} s:\n{self.stderr}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stderr(self) -> str:
        """What it has printed so far."""
        return self.stderr_file.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        """Lines for the user."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


@dataclass
class Warm:
    """The process that forks."""

    process: subprocess.Popen[str] = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT),
                           TOKENIZERS_PARALLELISM="false", NO_COLOR="1", TORCH_CPP_LOG_LEVEL="ERROR")
        self.process = subprocess.Popen([sys.executable, "-m", "tests.cli.warm"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> Any:
        """One question, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, arguments: Sequence[str], *, before: str = "",
              environment: dict[str, str] | None = None) -> Forked:
        """Run `pretrain ARGUMENTS` in `folder`; the Python statements `before` are run first, to break something.

        It is rank 0 of 1, unless `environment` says otherwise; with an empty one it is what a user starts, and each of
        the ranks that its launcher forks runs `before`.
        """
        self.count += 1
        stderr = folder / f"stderr-{self.count}.txt"
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        pid = self.ask({"arguments": list(arguments), "folder": str(folder), "stderr": str(stderr), "before": before,
                        "environment": alone if environment is None else environment})
        return Forked(self, pid, stderr)

    def close(self) -> None:
        """End the server; what it forked dies with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def serve() -> None:
    """Fork for each line of standard input."""
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import pretrain.cli.train
    import pretrain.engine.run
    import pretrain.models.baseline.family
    import pretrain.objectives.causal_lm  # noqa: F401
    for name in LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _run(request)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _run(request: dict[str, Any]) -> None:
    """The forked process: becomes what a shell would have started."""
    from pretrain.engine import launcher
    from pretrain.engine.launcher import _die_with
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with(os.getppid())
        output = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        if "RANK" not in os.environ:
            launcher.subprocess = _Forking(request["before"])  # type: ignore[assignment]
            request = {**request, "before": ""}
        code = _command(request["arguments"], request["before"])
    finally:
        os._exit(code)


def _command(arguments: Sequence[str], before: str) -> int:
    """`pretrain ARGUMENTS` in this process; its exit code."""
    from pretrain.cli.main import main
    try:
        sys.argv = ["pretrain", *arguments]
        exec(before, {})
        main()
        return 0
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _Forking:
    """In the place of the module `subprocess` in the launcher: its ranks are forks of this process."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self, before: str) -> None:
        self._before = before

    def Popen(self, command: list[str], *, env: Mapping[str, str], pass_fds: Iterable[int], process_group: int,
              stdin: int, preexec_fn: Callable[[], None]) -> subprocess.Popen[bytes]:
        """A forked process in the state in which `subprocess.Popen` would have left an executed one."""
        assert command[1:4] == ["-P", "-m", "pretrain.cli.main"]
        pid = os.fork()
        if pid:
            return _adopted(pid)
        code = 1
        try:
            os.setpgid(0, process_group)
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            at = 3
            for kept in (*sorted(pass_fds), os.sysconf("SC_OPEN_MAX")):
                os.closerange(at, min(kept, 4096))
                at = kept + 1
            os.environ.clear()
            os.environ.update(env)
            code = _command(command[4:], self._before)
        finally:
            os._exit(code)


def _adopted(pid: int) -> subprocess.Popen[bytes]:
    """The handle of a child that was not started through it."""
    child = subprocess.Popen.__new__(subprocess.Popen)
    vars(child).update(pid=pid, returncode=None, args=["forked rank"], stdin=None, stdout=None, stderr=None,
                       _child_created=True, _waitpid_lock=threading.Lock(), _input=None, _communication_started=False,
                       _closed_child_pipe_fds=True)
    return child


if __name__ == "__main__":
    serve()
