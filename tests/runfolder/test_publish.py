from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder import publish
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import (
    Manifest,
    hash_file,
    publish_dir,
    replace_dir,
    require_space,
    write_json_atomic,
    write_text_atomic,
)


@pytest.fixture
def checkpoint(tmp_path):
    """A finished checkpoint with two files and its manifest."""
    folder = tmp_path / "step-5.f2"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "deepspeed" / "shard").write_bytes(os.urandom(300_000))
    Manifest.collect(folder, {}, step=5, k=6, fence=2, world=4, stage=3, dtype="bf16").write(folder)
    return folder


def test_hash_is_the_sha256_of_all_bytes(tmp_path):
    data = os.urandom(700_001)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_manifest_survives_its_file(checkpoint):
    manifest = Manifest.read(checkpoint)
    assert (manifest.step, manifest.k, manifest.fence, manifest.world, manifest.stage, manifest.dtype) == \
        (5, 6, 2, 4, 3, "bf16")
    assert set(manifest.files) == {"state.json", "deepspeed/shard"}
    assert manifest.verify(checkpoint) == []
    again = shutil.copytree(checkpoint, checkpoint.with_name("copy"))
    (again / "manifest.json").unlink()
    digest = Manifest.collect(again, {}, step=5, k=6, fence=2, world=4, stage=3, dtype="bf16").write(again)
    assert digest == hash_file(checkpoint / "manifest.json")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("fault, seen_by_sizes, word", [
    (lambda c: _flip(c / "deepspeed" / "shard"), False, "SHA-256"),
    (lambda c: os.truncate(c / "deepspeed" / "shard", 1000), True, "1000 bytes"),
    (lambda c: (c / "state.json").unlink(), True, "is missing"),
    (lambda c: (c / "deepspeed" / "zero_pp_rank_9_optim_states.pt").touch(), True, "not in the manifest"),
    (lambda c: ((c / "state.json").rename(c.parent / "x"), (c / "state.json").symlink_to(c.parent / "x")), True, "-1"),
    (lambda c: (c / "more").symlink_to("/tmp"), True, "not in the manifest"),
])
def test_every_difference_is_found_and_named(checkpoint, fault, seen_by_sizes, word):
    fault(checkpoint)
    problems = Manifest.read(checkpoint).verify(checkpoint)
    assert len(problems) == 1
    assert word in problems[0]
    assert bool(Manifest.read(checkpoint).verify(checkpoint, "sizes")) == seen_by_sizes


def test_reader_pins_are_no_difference(checkpoint):
    (checkpoint / ".readers").mkdir()
    (checkpoint / ".readers" / "host-1").touch()
    assert Manifest.read(checkpoint).verify(checkpoint) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 3}}'])
def test_a_spoilt_manifest_is_named(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(DataCorruption, match=r"manifest\.json: cannot be read"):
        Manifest.read(checkpoint)


def test_a_hash_of_a_file_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(DataCorruption, match="rank-7 was written"):
        Manifest.collect(checkpoint, {"rank-7": "00"}, step=1, k=1, fence=1, world=8, stage=2, dtype="fp32")


def test_hashes_of_ranks_are_taken_as_they_are(checkpoint):
    given = {"deepspeed/shard": "f" * 64}
    manifest = Manifest.collect(checkpoint, given, step=1, k=1, fence=1, world=1, stage=2, dtype="fp32")
    assert manifest.files["deepspeed/shard"].sha256 == "f" * 64
    assert manifest.files["state.json"].sha256 == hash_file(checkpoint / "state.json")


def test_what_is_published_is_never_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(FileExistsError):
        publish_dir(tmp_path / "a", tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError):
        publish_dir(tmp_path / "a", tmp_path / "empty")
    assert (tmp_path / "b" / "file").read_text() == "b"


def test_json_without_nan(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "x.json", {"a": math.nan})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_space_is_checked_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 2)
    with pytest.raises(UserError, match=r"GB are needed and .* GB are free"):
        require_space(tmp_path, free * 2)


def test_an_unusable_run_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        RunFolder.create(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="no such folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(UserError, match="is no run folder"):
        RunFolder.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_a_user_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder.create(tmp_path / "run")


def test_an_existing_run_folder_is_taken_as_it_is(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    write_text_atomic(folder.config_file, "name: x\n")
    before = sorted(path.name for path in folder.root.rglob("*"))
    assert RunFolder.create(tmp_path / "run") == RunFolder.open(tmp_path / "run") == folder
    assert sorted(path.name for path in folder.root.rglob("*")) == before


def test_a_replaced_folder_is_there_whole_whenever_the_process_dies(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run")
    final = folder.checkpoints_dir / "step-3.f1"
    for number, text in enumerate(("old", "new")):
        temporary = folder.checkpoints_dir / f".tmp-f1-step-{number}"
        temporary.mkdir()
        (temporary / "manifest.json").write_text(text)
        if text == "old":
            replace_dir(temporary, final)
    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    for target in ("os.rename", "pretrain.runfolder.publish.fsync", "shutil.rmtree"):
        with monkeypatch.context() as patch:
            patch.setattr(target, dies)
            with pytest.raises(KeyboardInterrupt):
                replace_dir(folder.checkpoints_dir / ".tmp-f1-step-1", final)
        publish.restore_replaced(folder.checkpoints_dir)
        assert (final / "manifest.json").read_text() == "old", target
    replace_dir(folder.checkpoints_dir / ".tmp-f1-step-1", final)
    assert (final / "manifest.json").read_text() == "new"
    assert [path.name for path in folder.checkpoints_dir.iterdir()] == ["step-3.f1"]
