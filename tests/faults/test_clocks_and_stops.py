"""Clocks that jump, ranks that stop, commands given twice: one writer at a time, and the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from tests.cli.test_train_command import slow_data
from tests.cli.tiny_run import losses, status, until
from tests.cli.warm import Forked
from tests.faults.harness import Case, Outcome
from tests.faults.inject import REACHED, Point, statements
from tests.faults.points import BY_NAME

pytestmark = pytest.mark.slow
HOURS = 5 * 3600.0
QUICK_LEASE = """
from pretrain.runfolder.lease import Lease
Lease.beating.__wrapped__.__defaults__ = (0.2,)
Lease.acquire.__func__.__kwdefaults__["lease_timeout"] = 4.0
"""
"""A dead holder is passed over after 4 s and not after 120, and a live one says so more often."""


def clock(shift: float, from_batch: int = 0) -> str:
    """Statements that move this process's clock by `shift` seconds once a batch has been read."""
    return f"""
import time
from pretrain.data.loader import UpdateLoader
real, read_in_time = time.time, UpdateLoader.__next__
def jumping(loader):
    if loader._next_k >= {from_batch}:
        time.time = lambda: real() + {shift}
    return read_in_time(loader)
UpdateLoader.__next__ = jumping
if {from_batch} == 0:
    time.time = lambda: real() + {shift}
"""


def refused(run: Forked) -> None:
    assert run.wait() == 2, run.stderr
    assert len(run.errors) == 1
    assert "is held by process" in run.errors[0]


def beat_of_another_clock(case: Case, fence: int, shift: float) -> None:
    """What a heartbeat looks like at the moment at which the clock of the filesystem has jumped."""
    os.utime(case.root / f"lease/{fence}/heartbeat", (time.time() + shift,) * 2)


@pytest.mark.parametrize("jump", [HOURS, -HOURS], ids=["forward", "back"])
def test_a_jump_of_the_clock_takes_a_live_run_from_nobody(jump: float, case: Case, undisturbed: Outcome) -> None:
    run = case.start(before=QUICK_LEASE + slow_data(0.5) + clock(jump, from_batch=4))
    until(lambda: len(losses(case.root)) >= 5)
    beat_of_another_clock(case, 1, -jump)
    refused(case.start(before=QUICK_LEASE + clock(jump)))
    refused(case.start(before=QUICK_LEASE))
    assert run.wait() == 0, run.stderr
    assert case.outcome() == undisturbed


@pytest.mark.parametrize("jump", [HOURS, -HOURS], ids=["forward", "back"])
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_dead_holder_of_another_time_holds_nobody_up(jump: float, host: str, case: Case,
                                                       undisturbed: Outcome) -> None:
    case.hit(BY_NAME["before the rename"], "all")
    holder = case.root / "lease/1/holder.json"
    record = json.loads(holder.read_text())
    record["since"] += jump
    if host == "elsewhere":
        record["host"] = host
    holder.write_text(json.dumps(record))
    beat_of_another_clock(case, 1, jump)
    run = case.finish(before=QUICK_LEASE + clock(-jump))
    assert ("has been silent for more than 4 s" in run.stderr) == (host == "elsewhere")
    assert case.outcome() == undisturbed


@pytest.mark.parametrize("point", [
    Point("before the optimizer", "pretrain.engine.build:Engine.step", "before", nth=8, rank=1),
    Point("before the manifest", "pretrain.runfolder.publish:Manifest.write", "before", match="step=9"),
], ids=lambda point: point.name)
def test_a_rank_that_stops_ends_with_6_and_the_run_goes_on(point: Point, case: Case, undisturbed: Outcome) -> None:
    run = case.hit(point, "stop", "launch.hang_timeout=4")
    assert run.code == 6, run.stderr
    assert f"error: rank {point.rank} has made no progress for " in run.stderr
    assert status(case.root).state == "hang"
    assert case.newest() == 6
    case.finish()
    assert case.outcome() == undisturbed


def test_of_commands_given_at_once_one_trains(case: Case, undisturbed: Outcome) -> None:
    case.hit(BY_NAME["before the rename"], "launcher")
    runs = [case.start(before=slow_data(0.3)) for _ in range(3)]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0, 2, 2]
    for run in runs:
        if run.code:
            refused(run)
    assert case.outcome() == undisturbed


@pytest.mark.parametrize("point", [
    Point("in a step", "pretrain.engine.build:Engine.step", "after", nth=5),
    Point("before the manifest", "pretrain.runfolder.publish:Manifest.write", "before", match="step=6"),
    Point("before the rename", "os:rename", "before", match=r"tmp-f1-step-6 .*/step-6\.f1"),
    Point("after the rename", "os:rename", "after", match=r"tmp-f1-step-6 .*/step-6\.f1"),
], ids=lambda point: point.name)
def test_a_frozen_job_that_wakes_up_changes_nothing(point: Point, case: Case, undisturbed: Outcome) -> None:
    """Its machine stood still for longer than the lease lasts, and another start took over."""
    frozen = case.start(before=QUICK_LEASE + statements(point, "stop", case.folder))
    until(lambda: (case.folder / REACHED).exists())
    processes = [psutil.Process(frozen.pid), *psutil.Process(frozen.pid).children()]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4.5)
    assert "taking over" in case.finish(before=QUICK_LEASE).stderr
    assert case.outcome() == undisturbed
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert frozen.wait() == 2, frozen.stderr
    assert len(frozen.errors) == 1
    assert "another process took this run over" in frozen.errors[0]
    assert case.outcome() == undisturbed
    assert status(case.root).state == "done"
    case.finish()
    assert case.outcome() == undisturbed
