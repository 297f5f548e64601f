"""kill -9 between any two operations on the filesystem leaves what is complete, and what is not complete is invisible.

Each action runs in a forked child in which every call that changes a file counts; the child kills itself at the n-th,
for n = 1, 2, ... until the action gets through. After each death the invariants are checked in this process.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.runfolder import control
from pretrain.runfolder.holder import Holder, fences
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import Manifest, is_temporary, publish_dir, write_text_atomic
from pretrain.runfolder.retention import delete, pinned
from pretrain.runfolder.status import Status

COUNTED = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "utime", "open", "write")


def _count_down(n: int) -> None:
    """From now on, die before the n-th operation of this process; an open also counts after it has made the file."""
    left = itertools.count(n - 1, -1)

    def tick() -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function, after):
        def wrapper(*args, **kwargs):
            tick()
            result = function(*args, **kwargs)
            if after:
                tick()
            return result
        return wrapper

    for name in COUNTED:
        setattr(os, name, counted(getattr(os, name), name == "open"))
    builtins.open = io.open = counted(builtins.open, True)


def died_at(n: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies at its n-th operation; False if it got through before that."""
    child = os.fork()
    if child == 0:
        try:
            _count_down(n)
            action()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the action failed by itself"
    return False


def each_death(tmp_path: Path, prepare: Callable[[Path], None], action: Callable[[Path], object]):
    """Yield the folder after each possible death, and at last after the action got through."""
    for n in itertools.count(1):
        root = tmp_path / str(n)
        prepare(root)
        died = died_at(n, lambda root=root: action(root))
        yield root, died
        shutil.rmtree(root)
        if not died:
            assert n > 3, "almost nothing was counted: the harness does not see the operations"
            return


def publish(folder: RunFolder, fence: int, step: int, point: bool = True) -> None:
    """What an engine does: write aside, hash, describe, publish, point."""
    aside = folder.tmp_checkpoint(step, fence)
    (aside / "deepspeed").mkdir(parents=True)
    (aside / "state.json").write_text(str(step))
    (aside / "deepspeed" / "shard").write_bytes(os.urandom(100))
    manifest = Manifest.collect(aside, {}, step=step, k=step, fence=fence, world=1, stage=2, dtype="fp32")
    manifest.write(aside)
    ref = folder.final_checkpoint(step, fence)
    publish_dir(aside, ref.path)
    if point:
        folder.write_pointer("latest", ref)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Lays a run folder with one checkpoint, whose holder is dead, wherever it is told to."""
    template = tmp_path_factory.mktemp("template") / "run"

    def first() -> None:
        folder = RunFolder.create(template)
        lease = Lease.acquire(folder)
        lease.set_fresh()
        publish(folder, lease.fence, 10)
    assert not died_at(10**6, first)
    return lambda root: shutil.copytree(template, root)


def hidden(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name != ".readers"]


def test_a_replaced_file_is_old_or_new(tmp_path):
    def prepare(root: Path) -> None:
        root.mkdir()
        (root / "file").write_text("old")

    for root, died in each_death(tmp_path, prepare, lambda root: write_text_atomic(root / "file", "new" * 5000)):
        text = (root / "file").read_text()
        assert text in ({"old", "new" * 5000} if died else {"new" * 5000})
        assert all(is_temporary(path.name) for path in root.iterdir() if path.name != "file")


def test_a_checkpoint_is_complete_or_invisible(tmp_path, started):
    seen = set()
    for root, died in each_death(tmp_path, started, lambda root: publish(RunFolder(root), 1, 20)):
        folder = RunFolder(root)
        steps = [ref.step for ref in folder.checkpoints()]
        seen.add(tuple(steps))
        assert steps in ([10], [20, 10]) if died else steps == [20, 10]
        for ref in folder.checkpoints():
            assert Manifest.read(ref.path).verify(ref.path) == []
        assert folder.read_pointer("latest") in folder.checkpoints()
        lease = Lease.acquire(folder)
        folder.clean_temporaries(lease.fence)
        assert hidden(root) == []
        assert [ref.step for ref in folder.checkpoints()] == steps
    assert seen == {(10,), (20, 10)}


def test_a_killed_claim_never_blocks_the_next_start(tmp_path, started):
    def whole_life(root: Path) -> None:
        lease = Lease.acquire(RunFolder.create(root))
        lease.heartbeat()
        lease.set_resumed_from(10, 1, "0" * 64)
        lease.release()

    for root, _ in each_death(tmp_path, started, whole_life):
        folder = RunFolder(root)
        for fence in fences(folder.lease_dir):
            assert Holder.read(folder.lease_dir / str(fence)) is not None
        before = fences(folder.lease_dir)
        lease = Lease.acquire(folder)
        assert lease.fence == before[-1] + 1
        folder.clean_temporaries(lease.fence)
        assert hidden(root) == []
        assert [ref.step for ref in folder.checkpoints()] == [10]


def test_a_checkpoint_being_deleted_is_whole_or_gone(tmp_path, started):
    seen = set()
    for root, died in each_death(tmp_path, started, lambda root: delete(RunFolder(root).checkpoints()[0])):
        folder = RunFolder(root)
        found = folder.checkpoints()
        seen.add(len(found))
        assert died or not found
        lease = Lease.acquire(folder)
        folder.clean_temporaries(lease.fence)
        assert hidden(root) == []
        for ref in found:  # the deleter died before the point of no return: others may read it again
            with pinned(ref):
                assert Manifest.read(ref.path).verify(ref.path) == []
    assert seen == {0, 1}


def test_status_is_always_readable(tmp_path, started):
    def prepare(root: Path) -> None:
        started(root)
        Status(1, step=10).write(RunFolder(root))

    for root, died in each_death(tmp_path, prepare, lambda root: Status(1, step=20).write(RunFolder(root))):
        status = Status.read(RunFolder(root))
        assert status is not None
        assert status.step in ({10, 20} if died else {20})


def test_a_request_is_taken_once_or_lost_but_never_twice(tmp_path, started):
    def prepare(root: Path) -> None:
        started(root)
        control.request(RunFolder(root), "save")

    for root, died in each_death(tmp_path, prepare, lambda root: control.poll(RunFolder(root))):
        again = control.poll(RunFolder(root))
        assert again in ({}, {"save": ""}) if died else again == {}
        assert control.poll(RunFolder(root)) == {}


def test_a_killed_request_is_whole_or_absent(tmp_path, started):
    for root, died in each_death(tmp_path, started, lambda root: control.request(RunFolder(root), "reload_lr", "3e-4")):
        taken = control.poll(RunFolder(root))
        assert taken in ({}, {"reload_lr": "3e-4"}) if died else taken == {"reload_lr": "3e-4"}


def test_everything_is_flushed_before_its_name_appears(tmp_path, monkeypatch, started):
    """A power cut, unlike a kill, loses what was not flushed: at each rename all that it publishes must be flushed."""
    started(tmp_path / "run")
    flushed: set[str] = set()
    renamed: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.add(path)
        renamed[:] = [target for target in renamed if os.path.dirname(target) != path]

    def publishing(name):
        def wrapper(source, target):
            below = [str(path) for path in Path(source).rglob("*")] if os.path.isdir(source) else []
            for path in [str(source), *below]:
                assert path in flushed, f"{path} was not flushed before it became {target}"
            real[name](source, target)
            renamed.append(str(target))
        return wrapper

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", publishing("rename"))
    monkeypatch.setattr(os, "replace", publishing("replace"))
    publish(RunFolder(tmp_path / "run"), 1, 20, point=False)
    assert len(flushed) >= 6
    assert renamed == [], "a name was given whose folder was not flushed afterwards"


@pytest.mark.parametrize("limit", [1, 5000])
def test_a_full_disk_keeps_the_old_file(tmp_path, limit):
    """The limit on file size stands for a full disk: the write fails in the middle."""
    path = tmp_path / "file"
    path.write_text("old")

    def fill() -> None:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="too large"):
            write_text_atomic(path, "n" * 10000)

    assert not died_at(10**6, fill)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
