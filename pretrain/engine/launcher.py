"""Starts the ranks of a local run, forwards signals to them and returns the code on which they agreed.

Own and small because torchrun turns exit code 85 into 1, dies of SIGUSR1 and leaves its workers behind. Imports no
torch: the ranks' own start is what costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from pretrain.errors import ExitCode, UserError

LISTEN_FD = "PRETRAIN_LISTEN_FD"
"""Environment variable: number of the inherited socket on which rank 0 opens the rendezvous."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def launch(command: Sequence[str], nproc: int, *, port: int | None = None, threads: int | None = None,
           grace_s: float = 20.0) -> int:
    """Run `command` as `nproc` ranks and return the exit code of the run.

    Ranks get RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The rendezvous socket is opened here and
    inherited by rank 0, so that two runs can never meet on one port. When a rank ends with an error, the others get
    `grace_s` seconds to end by themselves before they are killed. When this process is killed, the kernel kills the
    ranks. Raises UserError when `port` is in use.
    """
    listener = _listen(port)
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.update(WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(listener.getsockname()[1]), PRETRAIN_LAUNCHED="1",
                       OMP_NUM_THREADS=str(threads or max(1, cores // nproc)))
    ranks: list[subprocess.Popen[bytes]] = []
    previous = {}

    def forward(number: int, _frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.send_signal(number)

    for number in _FORWARDED:
        previous[number] = signal.signal(number, forward)
    try:
        for index in range(nproc):
            own = dict(environment, RANK=str(index), LOCAL_RANK=str(index))
            if index == 0:
                own[LISTEN_FD] = str(listener.fileno())
            ranks.append(subprocess.Popen(  # own process group: a terminal's Ctrl-C reaches the ranks once, through us
                list(command), env=own, pass_fds=(listener.fileno(),) if index == 0 else (), process_group=0,
                preexec_fn=_die_with_parent))
        return _wait(ranks, grace_s)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        listener.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command of one rank. `-P` keeps a user's own `slurm/` or `evaluation/` folder off the import path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _listen(port: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
    except OSError as error:
        listener.close()
        raise UserError(f"launch.port: {port} cannot be used ({error.strerror}); "
                        "leave it out and a free port is taken") from None
    listener.listen(1024)
    return listener


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    """Exit code of the run: that of the rank that knew best, else 0."""
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return _meaning([code for code in codes if code])
        if any(codes) and deadline == float("inf"):
            deadline = time.monotonic() + grace_s
        if time.monotonic() > deadline:
            late = [str(index) for index, code in enumerate(codes) if code is None]
            print(f"error: rank {', '.join(late)} did not end {grace_s:.0f} s after another one failed; killing it",
                  file=sys.stderr)
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.05)


def _meaning(failures: list[int]) -> int:
    """The code that says most: one with a meaning before an internal error, which peers of a failed rank end with."""
    if not failures:
        return 0
    told = [code for code in failures if code > int(ExitCode.INTERNAL)]
    if told:
        return told[0]
    killed = [-code for code in failures if code < 0 and -code != signal.SIGKILL] or [-c for c in failures if c < 0]
    if killed and ExitCode.INTERNAL not in failures:
        print(f"error: a rank was killed by signal {killed[0]} ({signal.Signals(killed[0]).name})", file=sys.stderr)
        return int(ExitCode.INTERRUPTED if killed[0] == signal.SIGINT else ExitCode.INTERNAL)
    return int(ExitCode.INTERNAL)
