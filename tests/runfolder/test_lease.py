from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.holder import Holder, ProcessId, SlurmJob
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease, live_holder


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


def held_by(folder: RunFolder, process: ProcessId, slurm: SlurmJob | None = None, silent: float = 0.0) -> None:
    """Let fence 1 belong to `process`, whose last heartbeat is `silent` seconds old."""
    path = folder.lease_dir / "1"
    path.mkdir()
    Holder(1, process, slurm, time.time()).write(path)
    beat = path / "heartbeat"
    beat.touch()
    os.utime(beat, (time.time() - silent,) * 2)


def elsewhere() -> ProcessId:
    return replace(ProcessId.current(), host="elsewhere", boot_id="another", pid=1)


def _race(folder: RunFolder, barrier, reports, leave) -> None:
    barrier.wait()
    try:
        reports.put(("won", Lease.acquire(folder).fence, os.getpid()))
    except UserError as error:
        reports.put(("refused", str(error), os.getpid()))
    leave.wait()


def test_of_simultaneous_starts_exactly_one_wins(folder):
    fork = multiprocessing.get_context("fork")
    for round_ in range(1, 9):  # from round 2 on the last holder is dead, and all find that out at once
        barrier, reports, leave = fork.Barrier(4), fork.Queue(), fork.Event()
        processes = [fork.Process(target=_race, args=(folder, barrier, reports, leave)) for _ in range(4)]
        for process in processes:
            process.start()
        outcomes = [reports.get(timeout=30) for _ in processes]
        leave.set()
        for process in processes:
            process.join()
        won = [(fence, pid) for kind, fence, pid in outcomes if kind == "won"]
        assert [fence for fence, _ in won] == [round_]
        refused = [text for kind, text, _ in outcomes if kind == "refused"]
        assert all(f"process {won[0][1]} on " in text for text in refused)
    assert [path.name for path in folder.lease_dir.glob(".*")] == []


def test_a_held_folder_names_its_holder(folder):
    Lease.acquire(folder)
    with pytest.raises(UserError, match=rf"is held by process {os.getpid()} on .* since 20\d\d-"):
        Lease.acquire(folder)


def test_a_released_lease_is_free_at_once(folder):
    lease = Lease.acquire(folder)
    assert lease.still_held()
    lease.release()
    assert Lease.acquire(folder).fence == 2
    assert not lease.still_held()


def test_a_dead_process_of_this_machine_is_passed_over_at_once(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = float(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    held_by(folder, replace(ProcessId.current(), pid=child.pid, pid_start=start))
    assert live_holder(folder) is not None
    with pytest.raises(UserError, match=f"process {child.pid}"):
        Lease.acquire(folder)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, its parent has not taken notice: a zombie
    assert live_holder(folder) is None
    child.wait()
    assert Lease.acquire(folder).fence == 2


def test_a_reused_pid_is_not_the_holder(folder):
    me = ProcessId.current()
    held_by(folder, replace(me, pid_start=me.pid_start - 1))
    assert Lease.acquire(folder).fence == 2


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_ns"])
def test_a_process_elsewhere_is_not_judged_by_its_pid(folder, field):
    held_by(folder, replace(ProcessId.current(), pid=2**22 + 1, **{field: "other"}))
    with pytest.raises(UserError, match="is held by"):
        Lease.acquire(folder)


def test_a_silent_holder_elsewhere_is_passed_over_after_the_timeout(folder):
    held_by(folder, elsewhere(), silent=10.0)
    with pytest.raises(UserError, match="on elsewhere"):
        Lease.acquire(folder, lease_timeout=60.0)
    assert live_holder(folder, 60.0) is not None
    assert live_holder(folder, 0.4) is None
    assert Lease.acquire(folder, lease_timeout=0.4).fence == 2


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_jump_of_the_clock_unseats_nobody(folder, jump):
    held_by(folder, elsewhere(), silent=jump)
    holder = Lease(folder, Holder(1, elsewhere(), None, 0.0))
    with holder.beating(every=0.05), pytest.raises(UserError, match="on elsewhere"):
        Lease.acquire(folder, lease_timeout=2.0)


def test_a_dead_holder_with_a_heartbeat_in_the_future_does_not_block(folder):
    held_by(folder, elsewhere(), silent=-3600.0)
    assert Lease.acquire(folder, lease_timeout=0.4).fence == 2


def test_slurm_restart_takes_over_at_once_and_nothing_else_does(folder):
    held_by(folder, elsewhere(), SlurmJob("77", 1))
    for slurm in (None, SlurmJob("77", 1), SlurmJob("77", 0), SlurmJob("78", 9)):
        with pytest.raises(UserError, match="is held by"):
            Lease.acquire(folder, slurm=slurm)
    assert Lease.acquire(folder, slurm=SlurmJob("77", 2)).fence == 2


def test_slurm_job_is_read_from_the_environment():
    assert SlurmJob.from_environment({}) is None
    assert SlurmJob.from_environment({"SLURM_JOB_ID": "5"}) == SlurmJob("5", 0)
    assert SlurmJob.from_environment({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "3"}) == SlurmJob("5", 3)


def test_heartbeat_keeps_a_lease_alive(folder):
    lease = Lease.acquire(folder)
    beat = folder.lease_dir / "1" / "heartbeat"
    os.utime(beat, (0, 0))
    assert live_holder(folder, 5.0) is None
    lease.heartbeat()
    assert live_holder(folder, 5.0) == lease.holder
    os.utime(beat, (0, 0))
    with lease.beating(every=0.02):
        deadline = time.monotonic() + 10
        while live_holder(folder, 5.0) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]


def test_removed_leases_do_not_reuse_fences_of_checkpoints(folder):
    ref = folder.final_checkpoint(10, 7)
    ref.path.mkdir()
    (ref.path / "manifest.json").write_text("{}")
    assert Lease.acquire(folder).fence == 8
    assert [found.step for found in folder.checkpoints()] == [10]


def test_a_lease_removed_by_hand_is_no_longer_held(folder):
    lease = Lease.acquire(folder)
    for path in (folder.lease_dir / "1").iterdir():
        path.unlink()
    (folder.lease_dir / "1").rmdir()
    lease.heartbeat()
    assert not lease.still_held()


def test_holder_file_has_the_agreed_keys(folder):
    Lease.acquire(folder, slurm=SlurmJob("9", 2)).set_resumed_from(5, 1, "ab")
    raw = json.loads((folder.lease_dir / "1" / "holder.json").read_text())
    assert {"host", "boot_id", "pid", "pid_start", "slurm_job", "restart", "resumed_from"} <= set(raw)
    assert raw["resumed_from"] == {"step": 5, "fence": 1, "manifest_sha": "ab"}
    assert (raw["slurm_job"], raw["restart"]) == ("9", 2)


def test_a_spoilt_holder_file_is_named(folder):
    Lease.acquire(folder)
    (folder.lease_dir / "1" / "holder.json").write_text("{")
    with pytest.raises(DataCorruption, match=r"lease/1/holder\.json"):
        Lease.acquire(folder)
