"""What counts after any history of deaths, restarts and stale writers equals what a plain account of it says."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.runfolder.holder import FRESH, Holder, ProcessId
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.status import Status


def publish(folder: RunFolder, step: int, fence: int) -> None:
    path = folder.final_checkpoint(step, fence).path
    path.mkdir()
    (path / "manifest.json").write_text("{}")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_checkpoints_follow_the_chain(data):
    root = Path(tempfile.mkdtemp())
    try:
        _random_history(RunFolder.create(root), data)
    finally:
        shutil.rmtree(root)


def _random_history(folder: RunFolder, data: st.DataObject) -> None:
    """The account: for each holder, the work it inherited when it decided where to go on, and its own."""
    process = ProcessId.current()
    counts: list[tuple[int, int]] = []  # (fence, step) that count, oldest first
    top: dict[int, int] = {}  # highest step that each fence ever wrote
    for fence in range(1, data.draw(st.integers(2, 6), label="holders") + 1):
        path = folder.lease_dir / str(fence)
        path.mkdir()
        holder = Holder(fence, process, None, time.time())
        holder.write(path)
        assert seen(folder) == counts  # a claim alone hides nothing
        kind = data.draw(st.sampled_from(["resume", "resume", "fresh", "dies undecided"]), label="kind")
        if kind == "dies undecided":
            continue
        at = 0
        if kind == "resume" and counts:
            chosen = data.draw(st.integers(0, len(counts) - 1), label="resumed from")
            counts = counts[:chosen + 1]
            source, at = counts[-1]
            Holder(fence, process, None, 0.0, {"step": at, "fence": source, "manifest_sha": ""}).write(path)
        else:
            counts = []
            Holder(fence, process, None, 0.0, FRESH).write(path)
        for zombie in sorted(top):  # every older holder wakes up and publishes once more
            if data.draw(st.booleans(), label="zombie"):
                top[zombie] += 5
                publish(folder, top[zombie], zombie)
        for _ in range(data.draw(st.integers(0, 3), label="saves")):
            at += 10
            publish(folder, at, fence)
            counts.append((fence, at))
            top[fence] = at
        assert seen(folder) == counts


def seen(folder: RunFolder) -> list[tuple[int, int]]:
    return [(ref.fence, ref.step) for ref in reversed(folder.checkpoints())]


def test_a_copy_without_leases_shows_all(tmp_path):
    folder = RunFolder.create(tmp_path)
    for step, fence in ((10, 1), (20, 1), (30, 2)):
        publish(folder, step, fence)
    shutil.rmtree(folder.lease_dir)
    assert seen(folder) == [(1, 10), (1, 20), (2, 30)]


def test_only_published_names_are_checkpoints(tmp_path):
    folder = RunFolder.create(tmp_path)
    publish(folder, 10, 1)
    folder.tmp_checkpoint(20, 1).mkdir()
    for name in ("step-30.f1", "step-x.f1", ".trash-step-40.f1", "step-50"):
        (folder.checkpoints_dir / name).mkdir()
        if name != "step-30.f1":
            (folder.checkpoints_dir / name / "manifest.json").touch()
    assert seen(folder) == [(1, 10)]


def test_pointers_fall_back_with_a_message(tmp_path, caplog):
    folder = RunFolder.create(tmp_path)
    publish(folder, 10, 1)
    publish(folder, 20, 1)
    old, new = reversed(folder.checkpoints())
    assert folder.read_pointer("latest") is None
    folder.write_pointer("latest", new)
    folder.write_pointer("best-val/loss", old)
    assert folder.read_pointer("latest") == new
    assert folder.read_pointer("best-val/loss") == old
    assert (folder.checkpoints_dir / "best-val-loss").read_text() == "step-10.f1\n"
    assert caplog.text == ""
    shutil.rmtree(new.path)
    assert folder.read_pointer("latest") == old
    assert "step-20.f1" in caplog.text
    shutil.rmtree(old.path)
    caplog.clear()
    assert folder.read_pointer("best-val/loss") is None
    assert "step-10.f1" in caplog.text


def test_a_pointer_moved_by_a_stale_process_is_passed_over(tmp_path):
    folder = RunFolder.create(tmp_path)
    first = Lease.acquire(folder)
    first.set_fresh()
    publish(folder, 10, 1)
    first.release()
    Lease.acquire(folder).set_resumed_from(10, 1, "")
    publish(folder, 20, 2)
    publish(folder, 999, 1)
    folder.write_pointer("latest", CheckpointRef(folder.checkpoints_dir / "step-999.f1", 999, 1))
    assert folder.read_pointer("latest") == folder.checkpoints()[0]
    assert folder.checkpoints()[0].step == 20


def test_the_status_of_a_stale_process_hides_nothing(tmp_path):
    folder = RunFolder.create(tmp_path)
    Lease.acquire(folder).release()
    Lease.acquire(folder)
    assert Status.read(folder) is None
    live = Status(2, step=50).write(folder)
    Status(1, state="done", code=0, step=30).write(folder)
    assert Status.read(folder) == live
    # The stale process may also have decided to write before the new fence was claimed, and do so afterwards.
    folder.status_file.write_text(json.dumps({"fence": 1, "state": "done", "code": 0}))
    assert Status.read(folder) == live
