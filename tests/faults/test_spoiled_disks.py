"""A disk that is full, read-only or broken ends the run with one line; once it is mended the same command goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.tiny_run import status
from tests.faults.harness import Case, Outcome
from tests.faults.inject import BALLAST, DISK, Point, Victim, fill

pytestmark = pytest.mark.slow
STEPPING = Point("before the optimizer", "pretrain.engine.build:Engine.step", "before", nth=8)
WRITING = Point("before DeepSpeed's moments", "torch:save", "before", match=r"-9/.*rank_0.*optim_states")
WRITING_1 = Point("before the moments of rank 1", "torch:save", "before", match=r"-9/.*rank_1.*optim_states", rank=1)
PREPARING = Point("before the folder is made", "os:mkdir", "before", match="tmp-f1-step-9")
PUBLISHING = Point("before the rename", "os:rename", "before", match=r"tmp-f1-step-9 .*/step-9\.f1", newest=(6, 9))
"""A name needs no room on every disk."""


def can_mount(folder: Path) -> bool:
    """Whether this process may mount filesystems."""
    point = folder / "mount-point"
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(point)], check=False, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(point)], check=True)
    return True


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("mount") is None or not can_mount(tmp_path_factory.mktemp("probe")):
        pytest.skip("filesystems may not be mounted here")


@contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    """A filesystem for the time being."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments, str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def told(errors: list[str], stderr: str, *words: str) -> None:
    """One line, and nothing that only a programmer reads."""
    assert len(errors) == 1, stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("point, words", [
    (STEPPING, "are needed and"),
    (WRITING, "No space left on device"),
    (WRITING_1, "No space left on device"),
    (PUBLISHING, "No space left on device"),
], ids=lambda value: value.name if isinstance(value, Point) else "")
def test_a_full_disk(point: Point, words: str, case: Case, undisturbed: Outcome, mounts: None) -> None:
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=case.folder / DISK) as disk:
        run = case.hit(point, "full disk")
        assert run.code == 2, run.stderr
        told(run.errors, run.stderr, words)
        (disk / BALLAST).unlink()
        assert case.newest() in point.newest
        case.finish()
        assert case.outcome() == undisturbed


def test_a_disk_that_is_full_before_the_start(case: Case, undisturbed: Outcome, mounts: None) -> None:
    """With room for nothing, for the lease, for the status: whatever meets its end first says so."""
    causes = set()
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=case.folder / DISK) as disk:
        for pages in range(0, 24, 2):
            shutil.rmtree(case.root, ignore_errors=True)
            fill(disk, but=4096 * pages)
            run = case.start()
            assert run.wait() == 2, run.stderr
            told(run.errors, run.stderr)
            causes.update(cause for cause in ("No space left on device", "are needed and") if cause in run.errors[0])
            (disk / BALLAST).unlink()
        assert len(causes) == 2
        case.finish()
        assert case.outcome() == undisturbed


def test_a_full_disk_of_the_mirror_stops_nothing(case: Case, undisturbed: Outcome, mounts: None) -> None:
    with mounted("-t", "tmpfs", "-o", "size=100k", "tmpfs", at=case.folder / "disk"):
        assert "attempt 1 of 3: " in case.finish().stderr
        assert case.outcome() == undisturbed
        assert case.mirrored() == []


@pytest.mark.parametrize("point, victim", [(STEPPING, "file size"), (WRITING, "file size"),
                                           (WRITING_1, "file size"), (PUBLISHING, "EROFS")],
                         ids=lambda value: value.name if isinstance(value, Point) else value)
def test_a_disk_that_refuses_a_write(point: Point, victim: Victim, case: Case, undisturbed: Outcome) -> None:
    """Without a filesystem of its own: the limit on the size of files, and an error that every change gets."""
    run = case.hit(point, victim)
    assert run.code == 2, run.stderr
    told(run.errors, run.stderr, "File too large" if victim == "file size" else "Read-only file system")
    assert case.newest() == 6
    case.finish()
    assert case.outcome() == undisturbed


@pytest.mark.parametrize("point", [PREPARING, PUBLISHING], ids=lambda point: point.name)
def test_a_folder_that_becomes_read_only(point: Point, case: Case, undisturbed: Outcome, mounts: None) -> None:
    checkpoints = case.root / "checkpoints"
    checkpoints.mkdir(parents=True)
    with mounted("--bind", str(checkpoints), at=checkpoints):
        run = case.hit(point, "read-only")
        assert run.code == 2, run.stderr
        told(run.errors, run.stderr, "Read-only file system")
        assert status(case.root).state == "refused"
        subprocess.run(["mount", "-o", "remount,bind,rw", str(checkpoints)], check=True)
        assert case.newest() == 6
        case.finish()
        assert case.outcome() == undisturbed


def test_a_folder_that_is_read_only_from_the_start(case: Case, undisturbed: Outcome, mounts: None) -> None:
    with mounted("-t", "tmpfs", "-o", "size=64m,ro", "tmpfs", at=case.folder / DISK) as disk:
        run = case.start()
        assert run.wait() == 2, run.stderr
        told(run.errors, run.stderr, "cannot be used as run folder", "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        case.finish()
        assert case.outcome() == undisturbed
