"""Two real ranks of which one stops making progress: who is named, what is left, with which code it ends."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.cli.test_train_command import slow_data
from tests.cli.test_train_faults import at_batch_5, outcome, two_ranks
from tests.cli.tiny_run import losses, status, until

pytestmark = [pytest.mark.slow, pytest.mark.launch]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends_with_6(stopped, folder):
    root = folder / "runs/tiny"
    with two_ranks(folder, "train.length=5000 steps", "launch.hang_timeout=8", before=slow_data(0.02)) as launcher:
        until(lambda: len(losses(root)) > 5, 120)
        ranks = {p.environ()["RANK"]: p for p in psutil.Process(launcher.pid).children() if "RANK" in p.environ()}
        ranks[str(stopped)].send_signal(signal.SIGSTOP)
        errors = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 6
    assert f"error: rank {stopped} has made no progress for " in errors
    assert "its process does not answer" in errors
    assert f"killing rank {stopped}, still alive" in errors
    assert "Traceback" not in errors
    verdict = status(root)
    assert (verdict.state, verdict.code, verdict.reason) == ("hang", 6, "hang")
    assert verdict.message.startswith(f"rank {stopped} has made no progress")
    assert [p.name for p in (root / "hang-f1").iterdir()] == [f"rank-{1 - stopped}.txt"]
    assert "trainer.py" in (root / f"hang-f1/rank-{1 - stopped}.txt").read_text()


def test_a_rank_that_waits_for_something_else_is_told_from_those_that_wait_for_it(folder):
    before = at_batch_5(1, "import time; time.sleep(1000)")
    code, errors = outcome(folder, "launch.hang_timeout=6", before=before)
    root = folder / "runs/tiny"
    assert code == 6
    assert "error: rank 1 has made no progress for " in errors
    assert "after step 5, batch 5, phase data; its process is alive" in errors
    assert "rank 0 has made no progress" not in errors
    assert sorted(p.name for p in (root / "hang-f1").iterdir()) == ["rank-0.txt", "rank-1.txt"]
    assert "broken" in (root / "hang-f1/rank-1.txt").read_text()
    assert "Traceback" not in errors


def test_a_run_that_works_is_left_alone(folder):
    code, errors = outcome(folder, "launch.hang_timeout=5", before=slow_data(0.2))
    assert code == 0
    assert "progress" not in errors
    assert list((folder / "runs/tiny/heartbeat/f1").iterdir()) == []
