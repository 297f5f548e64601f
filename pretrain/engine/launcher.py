"""Starts the ranks of a local run, forwards signals to them and returns the code on which they agreed.

Own and small because torchrun turns exit code 85 into 1, dies of SIGUSR1 and leaves its workers behind. Imports no
torch: the ranks' own start is what costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.engine.ranks import LISTEN_FD
from pretrain.errors import ExitCode, UserError

_FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGUSR1: signal.SIGUSR1,
              signal.SIGHUP: signal.SIGTERM}
"""What we receive -> what the ranks get. A terminal that goes away asks for a checkpoint too."""
_HINTS: dict[int, str] = {
    signal.SIGKILL: "; out of memory, perhaps",
    signal.SIGBUS: "; a file that it had mapped has become shorter: a data shard, perhaps (the next start checks them)"}
"""What a signal that killed a rank may come from."""
_INTERRUPT_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1


def launch(command: Sequence[str], nproc: int, *, port: int | None = None, threads: int | None = None,
           grace_s: float = 20.0) -> int:
    """Run `command` as `nproc` ranks and return the exit code of the run.

    Ranks get RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The rendezvous socket is opened here and
    inherited by rank 0, so that two runs can never meet on one port. Ranks start with the forwarded signals blocked and
    unblock them once they can answer: none is lost, whenever it comes. When a rank ends, the others get `grace_s`
    seconds to end by themselves before they are killed. When this process is killed, the kernel kills the ranks.
    Raises UserError when `port` is in use.
    """
    listener = _listen(port)
    group = _Group(grace_s)
    previous = {}
    try:
        with _blocked(_FORWARDED):
            for number in _FORWARDED:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    previous[number] = signal.signal(number, group.forward)
            group.start(command, nproc, listener, threads)
        return group.wait()
    finally:
        group.kill()
        listener.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command of one rank. `-P` keeps a user's own `slurm/` or `evaluation/` folder off the import path."""
    return [sys.executable, "-P", "-m", module, *arguments]


@dataclass
class _Group:
    """The ranks of a launch."""

    grace_s: float
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    """Exit code by rank, in the order in which they ended by themselves."""
    deadline: float = math.inf
    interrupts: int = 0

    def start(self, command: Sequence[str], nproc: int, listener: socket.socket, threads: int | None) -> None:
        """Start all ranks; the listening socket is rank 0's from then on."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = dict(os.environ, WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(listener.getsockname()[1]),
                      OMP_NUM_THREADS=str(threads or max(1, cores // nproc)))
        launcher = os.getpid()
        for index in range(nproc):
            own = dict(shared, RANK=str(index), LOCAL_RANK=str(index))
            if index == 0:
                own[LISTEN_FD] = str(listener.fileno())
            # A process group of its own: a terminal's Ctrl-C reaches a rank once, through us.
            self.ranks.append(subprocess.Popen(
                list(command), env=own, pass_fds=(listener.fileno(),) if index == 0 else (), process_group=0,
                stdin=subprocess.DEVNULL, preexec_fn=lambda: _die_with(launcher)))
        listener.close()  # with it open here, ranks would go on connecting to a rank 0 that has died

    def forward(self, number: int, _frame: object) -> None:
        """Signal handler."""
        for rank in self.ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.send_signal(_FORWARDED[signal.Signals(number)])
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts == 2:  # ranks leave at once; one that is stuck outside of Python cannot
                self.deadline = min(self.deadline, time.monotonic() + min(self.grace_s, _INTERRUPT_GRACE_S))

    def wait(self) -> int:
        """Wait for all ranks. Returns the code of the run."""
        while self._watch():
            if time.monotonic() > self.deadline:
                late = [str(index) for index in range(len(self.ranks)) if index not in self.ended]
                first = next(iter(self.ended), None)
                what = f"rank {first} ended {self.grace_s:.0f} s ago" if first is not None else "interrupted twice"
                print(f"error: {what}; killing rank {', '.join(late)}, still alive", file=sys.stderr)
                self.kill()
                break
            time.sleep(0.05)
        return self._verdict()

    def _watch(self) -> bool:
        """Note which ranks have ended. True while one is alive."""
        for index, rank in enumerate(self.ranks):
            code = rank.poll()
            if code is None or index in self.ended:
                continue
            self.ended[index] = code
            self.deadline = min(self.deadline, time.monotonic() + self.grace_s)
            _kill_group(rank)  # its loader processes, where it could not stop them itself
            if code < 0:
                print(f"error: rank {index} was killed by {signal.Signals(-code).name}{_HINTS.get(-code, '')}",
                      file=sys.stderr)
        return len(self.ended) < len(self.ranks)

    def kill(self) -> None:
        """Kill what is alive."""
        for rank in self.ranks:
            if rank.poll() is None:
                _kill_group(rank)
                rank.wait()

    def _verdict(self) -> int:
        """The code that says most: one with a meaning before an internal error, which peers of a failed rank end with.

        Of several, one that needs a person before one that only wants to be started again.
        """
        known = {int(code) for code in ExitCode}
        told = [code for code in self.ended.values() if code in known and code > int(ExitCode.INTERNAL)]
        if told:
            return min(told)
        if self.interrupts > 1:
            return int(ExitCode.INTERRUPTED)
        all_done = len(self.ended) == len(self.ranks) and not any(self.ended.values())
        return int(ExitCode.DONE if all_done else ExitCode.INTERNAL)


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


@contextlib.contextmanager
def _blocked(numbers: Mapping[signal.Signals, object]) -> Iterator[None]:
    """Hold signals back; processes started meanwhile begin with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with(launcher: int) -> None:
    """Runs in a new rank: ask the kernel to kill it when the launcher dies, which may have happened already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(int(ExitCode.INTERNAL))


def _kill_group(rank: subprocess.Popen[bytes]) -> None:
    """Kill a rank and whatever it started: each rank leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
