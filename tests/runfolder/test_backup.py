"""A backup is a run folder that says the same as the run, byte for byte, and never a part of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time

import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.backup import Abandoned, back_up
from pretrain.runfolder.holder import fences
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease, live_holder
from pretrain.runfolder.publish import Manifest, publish_dir
from pretrain.runfolder.retention import live_pins
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole


def publish(folder: RunFolder, step: int, fence: int) -> CheckpointRef:
    temporary = folder.tmp_checkpoint(step, fence)
    (temporary / "deepspeed").mkdir(parents=True)
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    (temporary / "deepspeed" / "shard.pt").write_bytes(os.urandom(100_000))
    Manifest.collect(temporary, {}, step=step, k=step, fence=fence, world=1, stage=0, dtype="fp32").write(temporary)
    ref = folder.final_checkpoint(step, fence)
    publish_dir(temporary, ref.path)
    return ref


@pytest.fixture
def run(tmp_path):
    """Fence 1 wrote 10, 20, 30; fence 2 went on from 20 and holds the run."""
    folder = RunFolder.create(tmp_path / "runs" / "mine")
    folder.config_file.write_text("name: mine\n")
    first = Lease.acquire(folder)
    first.set_fresh()
    for step in (10, 20, 30):
        publish(folder, step, 1)
    first.release()
    second = Lease.acquire(folder)
    second.set_resumed_from(20, 1, "")
    publish(folder, 25, 2)
    Status(fence=2, step=25).write(folder)
    folder.metrics_jsonl.write_text('{"fence": 2, "step": 25}\n{"fence": 2, "st')
    return folder


def damage(ref: CheckpointRef) -> None:
    path = ref.path / "deepspeed" / "shard.pt"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def test_a_copy_says_what_the_run_says(run, tmp_path):
    for ref in run.checkpoints():
        copy = back_up(run, ref, tmp_path / "disk")
    assert copy.root == tmp_path / "disk" / "mine"
    assert [r.path.name for r in copy.checkpoints()] == [r.path.name for r in run.checkpoints()]
    assert copy.read_pointer("latest").step == 25
    assert all(Manifest.read(ref.path).verify(ref.path) == [] for ref in copy.checkpoints())
    assert live_holder(copy) is None
    assert live_holder(run) is not None
    assert Status.read(copy) == Status.read(run)
    assert copy.config_file.read_text() == "name: mine\n"
    assert copy.metrics_jsonl.read_text() == '{"fence": 2, "step": 25}\n'
    assert [live_pins(ref) for ref in run.checkpoints()] == [[]] * 3


def test_a_copy_can_be_gone_on_with_and_is_then_left_alone(run, tmp_path):
    copy = back_up(run, run.checkpoints()[0], tmp_path / "disk")
    assert Lease.acquire(copy).fence == 3
    with pytest.raises(UserError, match=r"gone on by itself \(fence 3\)"):
        back_up(run, run.checkpoints()[0], tmp_path / "disk")
    assert fences(copy.lease_dir) == [1, 2, 3]


def test_a_damaged_source_is_named_and_leaves_nothing(run, tmp_path):
    newest = run.checkpoints()[0]
    damage(newest)
    with pytest.raises(DataCorruption, match=rf"{newest.path}/deepspeed/shard.pt: .*SHA-256"):
        back_up(run, newest, tmp_path / "disk")
    assert list((tmp_path / "disk/mine/checkpoints").iterdir()) == []


def test_an_abandoned_copy_leaves_nothing(run, tmp_path):
    with pytest.raises(Abandoned):
        back_up(run, run.checkpoints()[0], tmp_path / "disk", lambda: True)
    assert list((tmp_path / "disk/mine/checkpoints").iterdir()) == []


def test_a_copy_that_stands_is_proven_and_not_replaced(run, tmp_path):
    ref = run.checkpoints()[0]
    copy = back_up(run, ref, tmp_path / "disk")
    before = (copy.checkpoints()[0].path / "state.json").stat()
    back_up(run, ref, tmp_path / "disk")
    assert (copy.checkpoints()[0].path / "state.json").stat() == before
    damage(copy.checkpoints()[0])
    with pytest.raises(DataCorruption, match="move this copy aside"):
        back_up(run, ref, tmp_path / "disk")


def test_what_a_killed_copy_left_is_removed_and_what_lives_is_not(run, tmp_path):
    checkpoints = tmp_path / "disk/mine/checkpoints"
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f".tmp-copy-{socket.gethostname()}-{pid}-step-5.f1" for pid in (ended.pid, os.getppid())]
    for name in names:
        (checkpoints / name).mkdir(parents=True)
    back_up(run, run.checkpoints()[0], tmp_path / "disk")
    assert [(checkpoints / name).exists() for name in names] == [False, True]


def test_the_run_itself_is_no_place_for_its_backup(run):
    with pytest.raises(UserError, match="holds the run itself"):
        back_up(run, None, run.root.parent)


def test_the_newest_whole_checkpoint_is_found_and_the_others_are_named(run, caplog):
    damage(run.checkpoints()[0])
    assert newest_whole(run).step == 20
    assert "checkpoint step-25.f2 is passed over" in caplog.text
    assert "shard.pt: does not have the bytes" in caplog.text
    (run.checkpoints_dir / "step-20.f1" / "manifest.json").unlink()
    assert newest_whole(run).step == 10
    assert "step-20.f1 is passed over" in caplog.text
    (run.checkpoints_dir / "step-10.f1" / "state.json").unlink()
    with pytest.raises(DataCorruption, match=r"none of 3 checkpoints is whole \(the newest: .*step-25.f2"):
        newest_whole(run)


def test_no_checkpoint_is_no_damage(tmp_path):
    assert newest_whole(RunFolder.create(tmp_path)) is None


def test_the_command_takes_the_newest_whole_one(run, tmp_path):
    damage(run.checkpoints()[0])
    done = CliRunner().invoke(app, ["backup", str(run.root), str(tmp_path / "disk")])
    assert (done.exit_code, done.output) == (0, f"step-20.f1 -> {tmp_path}/disk/mine\n")
    done = CliRunner().invoke(app, ["backup", str(run.root), "/dev/null"])
    assert isinstance(done.exception, UserError)
    assert "/dev/null" in str(done.exception)


def test_small_files_that_a_killed_backup_was_writing_are_removed_and_those_of_the_living_are_not(run, tmp_path):
    copy = back_up(run, run.checkpoints()[0], tmp_path / "disk")
    ended = subprocess.Popen(["true"])
    ended.wait()
    places = [copy.root / ".metrics.jsonl", copy.checkpoints_dir / ".latest", copy.lease_dir / "1/.holder.json"]
    for place in places:
        for pid in (ended.pid, os.getppid()):
            place.with_name(f"{place.name}.{pid}-0123abcd.tmp").touch()
    back_up(run, run.checkpoints()[0], tmp_path / "disk")
    assert [path.name.split(".")[-2] for path in sorted(copy.root.rglob(".*.tmp"))] == [f"{os.getppid()}-0123abcd"] * 3


def test_a_half_made_copy_is_removed_by_whoever_goes_on_with_the_copy(run, tmp_path):
    copy = back_up(run, run.checkpoints()[0], tmp_path / "disk")
    names = [f".tmp-copy-{host}-1-step-30.f2" for host in ("silent", "copying")]
    for name in names:
        (copy.checkpoints_dir / name).mkdir()
        (copy.checkpoints_dir / name / "part").touch()
    long_ago = time.time() - 4000
    for path in (copy.checkpoints_dir / names[0] / "part", copy.checkpoints_dir / names[0]):
        os.utime(path, (long_ago, long_ago))
    copy.clean_temporaries(Lease.acquire(copy).fence)
    assert [(copy.checkpoints_dir / name).exists() for name in names] == [False, True]
