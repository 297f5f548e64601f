"""The launcher with ranks that are a few lines of Python: no torch, milliseconds each."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.engine.launcher import launch
from pretrain.engine.ranks import rank_environment
from pretrain.errors import ExitCode, UserError

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def answer(handler, *numbers):
    for number in numbers:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
def here():
    Path(f"here-{rank}").write_text(str(os.getpid()))
"""
LAUNCH = """
import json, sys
from pretrain.engine.launcher import launch
command, nproc, grace = json.loads(sys.argv[1])
code = launch(command, nproc, grace_s=grace)
assert "torch" not in sys.modules
sys.exit(code)
"""


def ranks(body: str) -> list[str]:
    """Command of ranks that run `body`."""
    return [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(body)]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def launched(body: str, nproc: int = 2, grace_s: float = 5.0,
             hangup: signal.Handlers = signal.SIG_DFL) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a process of its own, once all its ranks have said that they are here; `hangup` is what SIGHUP
    does when it starts."""
    command = [sys.executable, "-P", "-c", LAUNCH, json.dumps([ranks(body), nproc, grace_s])]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup))
    try:
        deadline = time.monotonic() + 20
        while not all(Path(f"here-{rank}").exists() for rank in range(nproc)):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.01)
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def pids() -> list[int]:
    """Processes of the ranks."""
    return [int(path.read_text()) for path in sorted(Path().glob("here-*"))]


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends in time (a corpse that nobody has buried has ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_ranks_learn_who_they_are_and_rank_0_inherits_the_rendezvous() -> None:
    code = launch(ranks("""
        import socket
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        told = {name: os.environ[name] for name in names}
        told["group"] = os.getpgrp() == os.getpid()
        told["stdin"] = sys.stdin.read()
        descriptor = os.environ.get("PRETRAIN_LISTEN_FD")
        if descriptor:
            listener = socket.socket(fileno=int(descriptor))
            told["port"] = listener.getsockname()[1]
            told["listening"] = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        Path(f"told-{rank}").write_text(json.dumps(told))
    """), 3, threads=2)
    told = [json.loads(Path(f"told-{rank}").read_text()) for rank in range(3)]
    assert code == 0
    assert [t["RANK"] for t in told] == [t["LOCAL_RANK"] for t in told] == ["0", "1", "2"]
    assert {(t["WORLD_SIZE"], t["MASTER_ADDR"], t["OMP_NUM_THREADS"], t["group"], t["stdin"]) for t in told} == {
        ("3", "127.0.0.1", "2", True, "")}
    assert [t.get("listening") for t in told] == [1, None, None]
    assert {t["MASTER_PORT"] for t in told} == {str(told[0]["port"])}
    environment = {name: value for name, value in told[1].items() if isinstance(value, str)}
    assert rank_environment(environment).rank == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("codes", "expected"), [
    ((0, 0), ExitCode.DONE), ((85, 85), ExitCode.STOPPED), ((1, 85), ExitCode.STOPPED), ((0, 1), ExitCode.INTERNAL),
    ((1, 3), ExitCode.CORRUPT), ((85, 3), ExitCode.CORRUPT), ((1, 130), ExitCode.INTERRUPTED),
    ((-9, 1), ExitCode.INTERNAL), ((-9, 4), ExitCode.DIVERGED), ((-11, 0), ExitCode.INTERNAL),
    ((77, 0), ExitCode.INTERNAL), ((1, 2), ExitCode.USER)])
def test_the_code_that_says_most_is_returned(codes: tuple[int, int], expected: ExitCode) -> None:
    code = launch(ranks(f"""
        code = {codes}[rank]
        os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
    """), 2)
    assert code == expected


def test_a_killed_rank_is_named_before_the_others_complain(capfd: pytest.CaptureFixture[str]) -> None:
    launch(ranks("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        print("lost a peer", file=sys.stderr)
        sys.exit(1)
    """), 2)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["error: rank 1 was killed by SIGKILL; out of memory, perhaps", "lost a peer"]


@pytest.mark.parametrize(("sent", "received"), [
    (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")])
def test_a_signal_reaches_every_rank_once(sent: signal.Signals, received: str) -> None:
    with launched("""
        seen = []
        answer(lambda number, frame: seen.append(signal.Signals(number).name),
               signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        here()
        while not seen:
            time.sleep(0.01)
        time.sleep(0.3)
        Path(f"seen-{rank}").write_text(" ".join(seen))
        sys.exit(85)
    """) as launcher:
        launcher.send_signal(sent)
        assert launcher.wait(10) == 85
    assert [Path(f"seen-{rank}").read_text() for rank in range(2)] == [received, received]


def test_what_nohup_started_outlives_its_terminal() -> None:
    with launched("""
        answer(lambda number, frame: sys.exit(85), signal.SIGTERM)
        here()
        time.sleep(60)
    """, hangup=signal.SIG_IGN) as launcher:
        launcher.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(0.5)
        launcher.terminate()
        assert launcher.wait(10) == 85


def test_a_signal_that_comes_before_a_rank_can_answer_waits_for_it() -> None:
    with launched("""
        here()
        time.sleep(0.5)
        answer(lambda number, frame: sys.exit(85), signal.SIGTERM)
        time.sleep(60)
    """) as launcher:
        launcher.terminate()
        assert launcher.wait(10) == 85


def test_a_rank_that_outlives_a_failed_one_is_killed_after_the_grace() -> None:
    started = time.monotonic()
    with launched("""
        here()
        sys.exit(3) if rank == 0 else time.sleep(60)
    """, grace_s=0.5) as launcher:
        assert launcher.wait(10) == 3
        errors = launcher.stderr.read()  # type: ignore[union-attr]
    assert "rank 0 ended 0 s ago; killing rank 1, still alive" in errors
    assert time.monotonic() - started < 10
    assert gone(pids()[1], 0.1)


def test_ranks_that_end_within_the_grace_are_left_alone() -> None:
    with launched("""
        here()
        time.sleep(0.5 * rank)
        Path(f"done-{rank}").touch()
        sys.exit(rank and 85)
    """, grace_s=5) as launcher:
        assert launcher.wait(10) == 85
    assert Path("done-1").exists()


def test_two_interrupts_end_even_ranks_that_cannot_answer() -> None:
    with launched("""
        here()
        time.sleep(60)
    """, grace_s=0.5) as launcher:
        launcher.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(15) == 130
        assert all(gone(pid, 0.1) for pid in pids())


def test_ranks_die_with_a_killed_launcher() -> None:
    with launched("""
        here()
        time.sleep(60)
    """) as launcher:
        launcher.kill()
        assert all(gone(pid) for pid in pids())


def test_what_a_dead_rank_has_started_dies_too() -> None:
    with launched("""
        if os.fork() == 0:
            rank = "child"
        here()
        time.sleep(60) if rank == "child" else time.sleep(0.3)
    """, nproc=1) as launcher:
        assert launcher.wait(10) == 0
    assert gone(int(Path("here-child").read_text()))


def test_a_port_in_use_is_named_and_starts_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"launch.port: {port} cannot be used \(Address already in use\)"):
            launch(ranks("here()"), 2, port=port)
    assert pids() == []


def test_the_rendezvous_dies_with_rank_0() -> None:
    """A rank that comes late is refused at once, where an open socket would keep it waiting."""
    with launched("""
        here()
        if rank == 0:
            sys.exit(3)
        import socket
        while Path(f"/proc/{Path('here-0').read_text()}").exists() if Path("here-0").exists() else True:
            time.sleep(0.01)
        try:
            socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), 5)
        except ConnectionRefusedError:
            Path("refused").touch()
    """) as launcher:
        assert launcher.wait(10) == 3
    assert Path("refused").exists()


def test_handlers_of_the_caller_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    launch(ranks(""), 1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)] == before


