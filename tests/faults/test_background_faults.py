"""Ranks that are killed, stopped or meet a bad disk while a checkpoint is written in the background: the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cli.tiny_run import checkpoints, status
from tests.faults.harness import Case, Outcome
from tests.faults.inject import Point

pytestmark = pytest.mark.slow
BEHIND = "checkpoint.async_save=true"
WRITING = "pretrain.engine.writing"
KILLED = [
    Point("before anything is written", f"{WRITING}:Writing._run", "before", nth=3),
    Point("in the weights", "torch:save", "half", match=r"-9/.*model_states"),
    Point("in the moments of rank 1", "torch:save", "half", match=r"-9/.*rank_1.*optim_states", rank=1),
    Point("before a file is flushed", f"{WRITING}:HashedFile.close", "before", match=r"-9/.*optim", rank=1),
    Point("all is written, nothing published", "pretrain.engine.checkpoint:Saving.publish", "before", nth=3, rank=1),
    Point("before the rename", "os:rename", "before", match=r"tmp-f1-step-9 .*/step-9\.f1"),
]
LATE = Point("rank 1 is late", f"{WRITING}:HashedFile.close", "before", match=r"-9/.*optim", rank=1)
ALSO_LATE = Point("rank 0 is late", f"{WRITING}:HashedFile.close", "before", match=r"-9/.*optim")


def go_on(case: Case, undisturbed: Outcome) -> None:
    """The same command ends as if nothing had happened, and nothing half-made is left."""
    case.finish(BEHIND)
    assert case.outcome() == undisturbed


@pytest.mark.parametrize("victim", ["rank", "all"])
@pytest.mark.parametrize("point", KILLED, ids=lambda point: point.name)
def test_killed_in_a_save_in_the_background(point: Point, victim: str, case: Case, undisturbed: Outcome) -> None:
    assert case.hit(point, victim, BEHIND).code == 1
    assert case.newest() in (3, 6)
    go_on(case, undisturbed)


@pytest.mark.parametrize("point", [LATE, ALSO_LATE], ids=lambda point: point.name)
def test_a_signal_to_stop_waits_for_what_is_being_written(point: Point, case: Case, undisturbed: Outcome) -> None:
    stop = "do: import signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5)"
    assert case.hit(point, stop, BEHIND).code == 85
    assert status(case.root).state == "stopped"
    assert not any(checkpoints(case.root).values())
    assert 9 in checkpoints(case.root)
    case.finish(BEHIND)  # the stop has saved at a step of its own
    assert replace(case.outcome(), steps=[]) == replace(undisturbed, steps=[])


def test_a_second_interrupt_leaves_at_once(case: Case, undisturbed: Outcome) -> None:
    leave = ("do: import signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); "
             "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    assert case.hit(ALSO_LATE, leave, BEHIND).code == 130
    assert case.newest() == 6
    go_on(case, undisturbed)


@pytest.mark.parametrize("point", [LATE, ALSO_LATE], ids=lambda point: point.name)
def test_a_disk_that_refuses_the_end_of_a_file(point: Point, case: Case, undisturbed: Outcome) -> None:
    refuse = ("do: import errno; import pretrain.engine.writing as w\n"
              "class Refusing:\n"
              "    def __getattr__(self, name): return getattr(os, name)\n"
              "    def fsync(self, _): raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
              "w.os = Refusing()")
    run = case.hit(point, refuse, BEHIND)
    assert run.code == 2, run.stderr
    (line,) = run.errors
    assert f"step-9/deepspeed/zero_pp_rank_{point.rank}_mp_rank_00_optim_states.pt: cannot be written" in line
    assert "(Input/output error)" in line
    assert "Traceback" not in run.stderr
    assert case.newest() == 6
    assert not list(case.root.glob("checkpoints/.tmp-*"))
    go_on(case, undisturbed)


def test_a_disk_that_never_answers_is_a_hang_of_that_rank(case: Case, undisturbed: Outcome) -> None:
    """Training goes on until the next save waits for it."""
    run = case.hit(LATE, "do: import time; time.sleep(100)", BEHIND, "launch.hang_timeout=4")
    assert run.code == 6, run.stderr
    (line,) = run.errors
    assert line.startswith("error: rank 1 has made no progress")
    assert "after step 12" in line
    assert "phase save" in line
    assert case.newest() == 6
    go_on(case, undisturbed)
