"""A branch is whole or not there, holds the parent's very files, and asks nothing of the parent."""

from __future__ import annotations

import errno
import json
import os

import pytest

from pretrain.errors import DataCorruption, UserError
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder import branch as module
from pretrain.runfolder.branch import Lineage, branch_off
from pretrain.runfolder.holder import fences
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease, live_holder
from pretrain.runfolder.publish import MANIFEST, Manifest, hash_file
from pretrain.runfolder.retention import delete, live_pins
from tests.runfolder.test_backup import damage, publish


@pytest.fixture
def parent(tmp_path):
    """Fence 1 wrote 10, 20, 30; fence 2 went on from 20, wrote 25 and 35, and trains. 20 is the best."""
    folder = RunFolder.create(tmp_path / "runs" / "parent")
    folder.config_file.write_text("name: parent\n")
    first = Lease.acquire(folder)
    first.set_fresh()
    refs = {step: publish(folder, step, 1) for step in (10, 20, 30)}
    folder.write_pointer("best-val/loss", refs[20])
    first.release()
    second = Lease.acquire(folder)
    second.set_resumed_from(20, 1, "")
    for step in (25, 35):
        folder.write_pointer("latest", publish(folder, step, 2))
    rows = [(1, step) for step in (10, 20, 30)] + [(2, step) for step in (21, 25, 30, 35)]
    folder.metrics_jsonl.write_text("".join(f'{{"fence": {f}, "step": {s}}}\n' for f, s in rows) + '{"fence": 2, "st')
    return folder


@pytest.fixture
def root(parent):
    return parent.root.with_name("child")


@pytest.mark.parametrize(("asked", "step", "fence", "steps"), [
    (None, 35, 2, [10, 20, 21, 25, 30, 35]), ("25", 25, 2, [10, 20, 21, 25]), ("20", 20, 1, [10, 20]),
    ("best-val/loss", 20, 1, [10, 20])])
def test_a_branch_begins_with_the_checkpoint_that_was_asked_for(parent, root, asked, step, fence, steps):
    lineage = branch_off(parent.root, root, asked)
    child = RunFolder(root)
    (ref,) = child.checkpoints()
    source = parent.final_checkpoint(step, fence)
    assert (ref.step, ref.fence, lineage.step, lineage.fence, lineage.k) == (step, fence, step, fence, step)
    assert lineage.manifest_sha256 == hash_file(source.path / MANIFEST) == hash_file(ref.path / MANIFEST)
    assert lineage.parent == str(parent.root)
    assert Lineage.read(child) == lineage
    assert lineage.is_at(ref)
    assert Manifest.read(ref.path).verify(ref.path) == []
    assert child.read_pointer("latest") == ref
    assert child.parent_config_file.read_text() == "name: parent\n"
    lease = Lease.acquire(child)
    lease.set_resumed_from(step, fence, lineage.manifest_sha256)
    assert lease.fence == 3
    assert [row["step"] for row in read_metrics(child)] == steps


def test_files_are_shared_and_each_run_removes_its_own(parent, root):
    branch_off(parent.root, root, "25")
    source, copy = parent.final_checkpoint(25, 2), RunFolder(root).final_checkpoint(25, 2)
    for name in [*Manifest.read(copy.path).files, MANIFEST]:
        assert (source.path / name).samefile(copy.path / name)
    assert delete(source)
    assert Manifest.read(copy.path).verify(copy.path) == []


def test_the_parent_trains_on_and_is_left_as_it_was(parent, root):
    holder, before = live_holder(parent), {p: p.stat().st_mtime_ns for p in parent.root.rglob("*") if p.is_file()}
    branch_off(parent.root, root, None)
    assert live_holder(parent) == holder
    assert {p: p.stat().st_mtime_ns for p in parent.root.rglob("*") if p.is_file()} == before
    assert [live_pins(ref) for ref in parent.checkpoints()] == [[]] * 4
    assert live_holder(RunFolder(root)) is None
    assert fences(RunFolder(root).lease_dir) == [1, 2]


def test_where_there_are_no_hard_links_files_are_copied(parent, root, monkeypatch, caplog):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "link", link)
    caplog.set_level("INFO")
    branch_off(parent.root, root, "25")
    copy = RunFolder(root).final_checkpoint(25, 2)
    assert Manifest.read(copy.path).verify(copy.path) == []
    assert not (copy.path / "state.json").samefile(parent.final_checkpoint(25, 2).path / "state.json")
    assert "files were copied" in caplog.text


def test_the_same_again_finds_the_branch_and_does_not_touch_it(parent, root):
    lineage = branch_off(parent.root, root, "25")
    publish(parent, 45, 2)
    for asked in (None, "25"):
        assert branch_off(parent.root, root, asked) == lineage
    assert [ref.step for ref in RunFolder(root).checkpoints()] == [25]


@pytest.mark.parametrize(("asked", "message"), [
    ("20", "began at step 25 of .*, not at 20"), ("best-val/loss", "not at best-val/loss")])
def test_a_branch_does_not_begin_twice(parent, root, asked, message):
    branch_off(parent.root, root, "25")
    with pytest.raises(UserError, match=message):
        branch_off(parent.root, root, asked)


def test_what_is_no_branch_of_this_run_is_refused(parent, root, tmp_path):
    RunFolder.create(root)
    with pytest.raises(UserError, match=r"child: exists and is no branch, not one of .*parent"):
        branch_off(parent.root, root, None)
    other = tmp_path / "runs" / "other"
    branch_off(parent.root, other, None)
    with pytest.raises(UserError, match=r"other: is a branch of .*parent, not one of .*child"):
        branch_off(root, other, None)
    with pytest.raises(UserError, match="another name than its parent"):
        branch_off(parent.root, parent.root, None)
    with pytest.raises(UserError, match="there is no such folder"):
        branch_off(tmp_path / "runs" / "nobody", tmp_path / "runs" / "new", None)


@pytest.mark.parametrize(("asked", "message"), [
    ("11", r"has no checkpoint of step 11; there are 10, 20, 25, 35"),
    ("30", r"has no checkpoint of step 30; there are 10, 20, 25, 35"),
    ("best-val/los", r'"best-val/los" is neither a step nor a best-METRIC of it; of these there are: best-val-loss'),
    ("newest", "neither a step nor a best-METRIC")])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(parent, root, asked, message):
    with pytest.raises(UserError, match=message):
        branch_off(parent.root, root, asked)
    assert not root.exists()


def test_a_run_without_checkpoints_has_no_branches(tmp_path):
    empty = RunFolder.create(tmp_path / "empty")
    with pytest.raises(UserError, match="has no checkpoint to branch off from yet"):
        branch_off(empty.root, tmp_path / "child", None)


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_asked_for(parent, root, caplog):
    damage(parent.final_checkpoint(35, 2))
    with pytest.raises(DataCorruption, match=r"shard\.pt: does not have the bytes"):
        branch_off(parent.root, root, "35")
    assert not root.exists()
    assert branch_off(parent.root, root, None).step == 25
    assert "step-35.f2 is passed over" in caplog.text


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(parent, root, monkeypatch):
    link = module._link

    def late(source, target):
        if source.name == "step-35.f2":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))
        link(source, target)

    monkeypatch.setattr(module, "_link", late)
    assert branch_off(parent.root, root, None).step == 25


def test_a_branch_that_is_killed_half_way_is_not_there(parent, root, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish_dir", killed)
        patch.setattr(module.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            branch_off(parent.root, root, None)
    (left,) = root.parent.glob(".branch-child-*")
    gone = left.rename(left.with_name(f"{left.name.rpartition('-')[0]}-4194305"))
    assert not root.exists()
    assert branch_off(parent.root, root, None).step == 35
    assert not gone.exists()


def test_ranks_that_met_in_the_folder_are_no_hindrance(parent, root):
    (root / "slurm").mkdir(parents=True)
    (root / "slurm" / "starts.jsonl").write_text("{}\n")
    assert branch_off(parent.root, root, None).step == 35
    assert (root / "slurm" / "starts.jsonl").read_text() == "{}\n"


def test_a_lineage_that_cannot_be_read_is_named(parent, root):
    branch_off(parent.root, root, None)
    (root / "branch.json").write_text(json.dumps({"parent": "x"}))
    with pytest.raises(DataCorruption, match=r"branch\.json: cannot be read"):
        branch_off(parent.root, root, None)
