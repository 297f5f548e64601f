"""What follows a start: every way in which one can end, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.slurm import SlurmConfig
from pretrain.errors import ExitCode, UserError
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import VERDICTS, Status
from slurm import batch
from slurm.codes import NOTHING_TO_DO, REQUEUE
from slurm.decide import Outcome, decide, may_begin, outcome_of
from slurm.facts import Facts, cause_of
from slurm.history import Start, note, note_submission, read_history, starts_file
from slurm.script import frozen_config
from tests.slurm.cluster import ROOT, payload_config

RUNNING = ("JobId=7 JobName=run JobState=RUNNING Reason=None Restarts=1 PreemptTime=None EndTime=2026-01-01T00:00:00\n"
           "TimeLeft=1-02:03:04\nBadNode=n2 down*\nBadNode=n2 down*\nBadNode=x9 drained\n")
FACTS = Facts(state="RUNNING", restarts=0, seconds_left=5000)
START = Start("7", 0, "n[1-4]", begun=100.0, step=40, fence=3)


def slurm(**values: Any) -> SlurmConfig:
    return SlurmConfig.model_validate({"time": "2:00:00", **values})


def test_what_the_controller_says_is_read() -> None:
    facts = Facts.parse(RUNNING)
    assert facts == Facts("RUNNING", 1, False, 93784, (("n2", "down*"), ("x9", "drained")))
    assert facts.failed("n[1-4]") == ["n2 (down*)"]
    assert Facts.parse("slurm_load_jobs error: Unable to contact slurm controller\n") == Facts()
    assert Facts.parse(RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")).preempted
    assert Facts.parse("TimeLeft=4:30").seconds_left == 270
    assert Facts.parse("TimeLeft=UNLIMITED").seconds_left is None
    assert Facts.parse("TimeLeft=INVALID").seconds_left == 0


@pytest.mark.parametrize(("facts", "cause"), [
    (FACTS, "asked"),
    (Facts("RUNNING", 0, seconds_left=300), "time limit"),
    (Facts("RUNNING", 0, seconds_left=360), "time limit"),  # Slurm may send the signal a minute early
    (Facts("RUNNING", 0, True, 5), "preempted"),
    (Facts("COMPLETING", 0, True, 5), "preempted"),
    (Facts("COMPLETING", 0, seconds_left=5000), "cancelled"),
    (Facts("COMPLETING", 0, seconds_left=200), "cancelled"),
    (Facts("COMPLETING", 0, seconds_left=0), "time limit"),
    (Facts("CANCELLED", 0, seconds_left=5000), "cancelled"),
    (Facts("COMPLETING", 1, seconds_left=5000), "requeued by Slurm"),
    (Facts("COMPLETING", 1, True, 5), "requeued by Slurm"),
    (Facts(), "asked"),
])
def test_a_time_limit_is_told_from_a_preemption_and_both_from_a_cancellation(facts: Facts, cause: str) -> None:
    assert cause_of(facts, 0, 300) == cause


def ended(code: ExitCode, reason: str = "", *, progressed: bool = True) -> Outcome:
    return Outcome(int(code), reason, 50, progressed)


def start(**values: Any) -> Start:
    fields = {name: getattr(START, name) for name in START.__slots__}
    return Start(**{**fields, **values})


@pytest.mark.parametrize(("code", "action"), [
    (ExitCode.DONE, "finish"), (ExitCode.INTERNAL, "requeue"), (ExitCode.USER, "finish"), (ExitCode.CORRUPT, "finish"),
    (ExitCode.DIVERGED, "finish"), (ExitCode.FAILED_CHECK, "finish"), (ExitCode.HANG, "requeue"),
    (ExitCode.INTERRUPTED, "finish")])
def test_every_exit_code_has_one_thing_that_follows(code: ExitCode, action: str) -> None:
    assert decide(slurm(), START, ended(code, "why"), FACTS).action == action
    assert set(VERDICTS) == set(ExitCode)


@pytest.mark.parametrize("cause", ["time limit", "preempted", "asked"])
def test_a_run_that_saved_for_a_signal_goes_on(cause: str) -> None:
    decision = decide(slurm(), start(cause=cause), ended(ExitCode.STOPPED, "SIGUSR1"), FACTS)
    assert decision.action == "requeue"
    assert decision.reason.startswith(cause)


@pytest.mark.parametrize("reason", ["control/stop", "control/save_and_stop", "train.max_hours", "SIGTERM"])
def test_a_run_that_someone_wanted_to_stop_stays_stopped(reason: str) -> None:
    decision = decide(slurm(), START, ended(ExitCode.STOPPED, reason), FACTS)
    assert (decision.action, decision.reason, decision.code) == ("finish", f"stopped: {reason}", 85)


@pytest.mark.parametrize(("values", "reason"), [
    ({"cause": "time limit"}, "time limit; this start made no progress"), ({}, "boom; this start made no progress")])
def test_nothing_is_tried_again_without_progress(values: dict[str, Any], reason: str) -> None:
    code = ExitCode.STOPPED if values else ExitCode.INTERNAL
    decision = decide(slurm(), start(**values), ended(code, "boom", progressed=False), FACTS)
    assert (decision.action, decision.reason, decision.code) == ("finish", reason, int(code))


def test_a_preemption_needs_no_progress_but_counts_as_a_restart() -> None:
    outcome = ended(ExitCode.STOPPED, "SIGUSR1", progressed=False)
    assert decide(slurm(), start(cause="preempted"), outcome, FACTS).action == "requeue"
    decision = decide(slurm(max_restarts=2), start(cause="preempted", restart=2), outcome, Facts("RUNNING", 2))
    assert (decision.action, decision.reason) == ("finish", "preempted; slurm.max_restarts 2 reached")


def test_a_machine_that_failed_needs_no_progress_either() -> None:
    facts = Facts("RUNNING", 0, bad_nodes=(("n3", "down*"),))
    fruitless = ended(ExitCode.INTERNAL, "rank 1 lost its connection", progressed=False)
    assert decide(slurm(), START, fruitless, facts).action == "requeue"
    elsewhere = Facts("RUNNING", 0, bad_nodes=(("n9", "down*"),))
    assert decide(slurm(), START, fruitless, elsewhere).action == "finish"


@pytest.mark.parametrize(("srun", "before", "action"), [
    (137, ["leave"], "requeue"), (137, ["leave", "requeue"], "requeue"), (137, ["requeue"], "finish"),
    (137, [], "finish"), (137, ["leave", *["requeue"] * 3], "finish"), (1, ["leave"], "finish")])
def test_a_start_that_a_lost_batch_script_may_have_killed_is_tried_again(srun: int, before: list[Any],
                                                                         action: str) -> None:
    """Its srun, reachable again, ends step 1 of the job, which by then is a step of the next start."""
    earlier = [start(begun=float(number), action=each) for number, each in enumerate(before)]
    outcome = outcome_of(START, earlier, Status(4, "running"), 40, srun)
    decision = decide(slurm(), START, outcome, FACTS)
    assert (decision.action, decision.code) == (action, 1)
    assert decision.reason.startswith(f"ended without a verdict (srun: {srun})")


def test_what_slurm_does_itself_is_left_to_it() -> None:
    facts = Facts("COMPLETING", 1, bad_nodes=(("n3", "down*"),))
    decision = decide(slurm(), START, ended(ExitCode.INTERNAL, "rank 1 lost its connection"), facts)
    assert (decision.action, decision.reason) == ("leave", "node failure: n3 (down*)")
    by_hand = decide(slurm(), START, ended(ExitCode.STOPPED, "SIGTERM"), Facts("COMPLETING", 1))
    assert (by_hand.action, by_hand.reason) == ("leave", "requeued by Slurm")


def test_a_cancelled_job_is_never_requeued() -> None:
    for code in (ExitCode.STOPPED, ExitCode.INTERNAL, ExitCode.HANG):
        assert decide(slurm(), start(cause="cancelled"), ended(code), FACTS).action == "finish"
        assert decide(slurm(), START, ended(code), Facts("COMPLETING", 0, seconds_left=5000)).action == "finish"


def test_without_requeueing_a_chain_goes_on_and_a_single_start_ends() -> None:
    stopped = ended(ExitCode.STOPPED, "SIGUSR1")
    assert decide(slurm(restart="chain"), start(cause="time limit"), stopped, FACTS).action == "next"
    assert decide(slurm(restart="chain"), START, ended(ExitCode.DIVERGED), FACTS).action == "finish"
    never = decide(slurm(restart="never"), start(cause="time limit"), stopped, FACTS)
    assert (never.action, never.reason, never.code) == ("finish", "time limit; slurm.restart is never", 85)


def test_progress_is_a_newer_checkpoint_or_a_step_never_reached_before() -> None:
    def progressed(saved: int, reached: int, *earlier: Start) -> bool:
        status = Status(4, "failed", 1, step=reached)
        return outcome_of(START, earlier, status, saved, 1).progressed

    assert progressed(41, 40)
    assert progressed(40, 45)
    assert not progressed(40, 40)
    assert not progressed(40, 45, start(begun=1.0, reached=45))  # the same place as last time
    assert progressed(40, 46, start(begun=1.0, reached=45))


def test_only_a_status_of_this_start_counts() -> None:
    own = outcome_of(START, [], Status(4, "diverged", 4, reason="r", message="the last 3"), 40, 137)
    assert (own.code, own.reason) == (4, "the last 3")
    older = outcome_of(START, [], Status(3, "done", 0), 40, 137)
    assert (older.code, older.reason) == (1, "ended before it took the run folder (srun: 137)")
    assert outcome_of(START, [], None, 40, 2).code == 2  # refused before anything was written
    running = outcome_of(START, [], Status(4, "running"), 40, 0)
    assert (running.code, running.reason) == (1, "ended without a verdict (srun: 0)")


def test_a_link_of_a_chain_has_nothing_to_do_once_another_has_finished() -> None:
    done = start(job="7", ended=200.0, action="finish", code=0, reason="done")
    failed = start(job="7", ended=200.0, action="finish", code=4, reason="diverged")
    chain = slurm(restart="chain")
    assert may_begin(chain, "8", 0, ("7", "8"), [done]) == "job 7 ended: done"
    assert may_begin(chain, "8", 0, ("7", "8"), [failed]) == "job 7 ended: diverged"
    assert may_begin(chain, "8", 0, ("7", "8"), [start(ended=200.0, action="next", code=85)]) is None
    assert may_begin(chain, "9", 0, ("9",), [failed]) is None  # submitted anew, by a person who has looked
    assert may_begin(slurm(), "7", 1, ("7",), [done]) == "job 7 ended: done"
    assert may_begin(slurm(), "7", 1, ("7",), [failed]) is None  # requeued by hand
    assert may_begin(slurm(max_restarts=1), "7", 2, ("7",), []) == "slurm.max_restarts 1 reached"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder that has been submitted, inside of its job."""
    folder = RunFolder.create(tmp_path / "run")
    folder.slurm_dir.mkdir()
    frozen_config(folder).write_text((tmp_path / "run.yaml").read_text() if payload_config(tmp_path, 10) else "")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    return folder


def test_a_start_that_could_not_say_why_it_ended_is_given_a_reason_by_the_next(
        folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.begin(folder, slurm(), FACTS) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert batch.begin(folder, slurm(), Facts("RUNNING", 1, bad_nodes=(("n1", "down*"),))) == 0
    first, second = read_history(folder)
    assert (first.reason, first.action) == ("node failure: n1 (down*)", "leave")
    assert second.ended is None


def test_a_batch_script_that_wakes_up_late_changes_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.begin(folder, slurm(), FACTS)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    batch.begin(folder, slurm(), Facts("RUNNING", 1))
    before = read_history(folder)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert batch.end(folder, slurm(), Facts("RUNNING", 1), 1) != REQUEUE
    assert read_history(folder) == before


def test_nothing_is_requeued_without_an_answer_of_the_controller(folder: RunFolder) -> None:
    batch.begin(folder, slurm(), FACTS)
    Status(1, "failed", 1, step=5).write(folder)
    assert batch.end(folder, slurm(), Facts(), 1) == 1
    assert batch.end(folder, slurm(), FACTS, 1) == REQUEUE


def test_a_request_that_is_left_over_does_not_stop_the_next_start(folder: RunFolder,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    batch.begin(folder, slurm(), FACTS)
    batch.interrupted(folder, slurm(), FACTS, "USR1", ask=True)
    request = folder.control_dir / "save_and_stop"
    assert request.exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    batch.begin(folder, slurm(), Facts("RUNNING", 1))
    assert not request.exists()


def test_a_link_of_a_chain_that_is_done_does_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    note_submission(folder, ["7", "8"])
    batch.begin(folder, slurm(restart="chain"), FACTS)
    note(folder, "end", "7", 0, ended=1.0, reason="done", code=0, action="finish")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert batch.begin(folder, slurm(restart="chain"), FACTS) == NOTHING_TO_DO


def test_a_link_of_a_chain_that_waits_for_a_person_fails(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the success of the last link must not begin."""
    note_submission(folder, ["7", "8"])
    batch.begin(folder, slurm(restart="chain"), FACTS)
    note(folder, "end", "7", 0, ended=1.0, reason="diverged", code=4, action="finish")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert batch.begin(folder, slurm(restart="chain"), FACTS) == ExitCode.INTERNAL


def test_torn_lines_of_the_history_are_passed_over(folder: RunFolder) -> None:
    batch.begin(folder, slurm(), FACTS)
    with open(starts_file(folder), "a") as file:
        file.write('{"event": "end", "job"')
    note(folder, "end", "7", 0, ended=1.0)
    start, = read_history(folder)
    assert start.ended == 1.0


def test_the_helper_is_only_for_batch_scripts(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set"):
        batch.begin(folder, slurm(), FACTS)


@pytest.mark.parametrize(("allocated", "nodes"), [(4, 4), (5, 4), (7, 6), (3, 3), (1, 1)])
def test_as_many_machines_are_used_as_the_batch_divides_over(allocated: int, nodes: int, tmp_path: Path) -> None:
    config = payload_config(tmp_path, 10).config  # a batch of 12
    assert batch.usable_nodes(config, slurm(nodes=8, min_nodes=1), allocated) == nodes


def test_a_batch_that_divides_over_nothing_is_refused(tmp_path: Path) -> None:
    config = payload_config(tmp_path, 10).config
    with pytest.raises(UserError, match="divides over no number of machines up to 3 with 7 ranks each"):
        batch.usable_nodes(config, slurm(nodes=8, min_nodes=1, tasks_per_node=7), 3)


def test_what_the_batch_script_asks_loads_no_torch() -> None:
    code = "import sys, slurm.batch, slurm.nodecheck; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60, cwd=ROOT,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
