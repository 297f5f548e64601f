"""The folder beside a dataset in which it is made: who may write there, and what of it a later run may take over.

    .NAME.partial/             becomes NAME when it is complete
    .NAME.partial/work/        intermediate results, removed at the end
    .NAME.partial/work/made-of what they were made of: config, files with sizes and times, version of this package

A process that makes a dataset holds a lock on the folder; processes that do a share of the work hold it together. What
a killed one leaves is whole as far as it goes, and used again where nothing has changed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.files import canonical_json, write_atomic
from data_prep.manifest import MANIFEST, Manifest
from pretrain.errors import UserError
from pretrain.runfolder.publish import fsync

WORK = "work"
_MADE_OF = "made-of"
_WAIT_SECONDS = 30.0
"""A share waits so long for the process that sets the folder up."""


class WorkKept(UserError):
    """Preparation ended early; what is finished is kept for the next run."""


@contextmanager
def open_work(out: Path, recipe: dict[str, Any], files: dict[str, Any], *, shared: bool) -> Iterator[Path]:
    """The partial folder of the dataset `out`, locked: for this process alone, or with other shares of the same work.

    What another config, other files or another version left there is removed. Errors of the user remove it too, but
    for `WorkKept`, and never where it is shared.

    Raises UserError where another process is at work on the same dataset.
    """
    folder = out.with_name(f".{out.name}.partial")
    stated = canonical_json({"recipe": recipe, "files": files, "version": importlib.metadata.version("pretrain")})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        _lock(descriptor, folder, out, stated, recipe, shared)
        try:
            yield folder
        except UserError as error:
            if not shared and not isinstance(error, WorkKept):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, out: Path, stated: bytes, recipe: dict[str, Any], shared: bool) -> None:
    """Lock an opened folder until it is closed or the process ends, however it ends, and set it up."""
    busy = UserError(f"{out}: another process is preparing this dataset; wait for it or give another `out`")
    if _locked(descriptor, folder, fcntl.LOCK_EX):
        _set_up(folder, stated, recipe)
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return
    if not shared:
        raise busy
    until = time.monotonic() + _WAIT_SECONDS
    while not _locked(descriptor, folder, fcntl.LOCK_SH):
        if time.monotonic() > until:
            raise busy
        time.sleep(0.1)
    if (folder / WORK / _MADE_OF).read_bytes() != stated:
        raise UserError(f"{out}: other processes prepare this dataset by another config or of other files; "
                        "give another `out`")


def _locked(descriptor: int, folder: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        # Whoever held the lock until now may have renamed the folder that we opened.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _set_up(folder: Path, stated: bytes, recipe: dict[str, Any]) -> None:
    """Keep what belongs to this work, remove everything else."""
    made_of = folder / WORK / _MADE_OF
    if is_finished(folder):
        same = Manifest.read(folder).provenance.get("config") == recipe
    else:
        same = made_of.exists() and made_of.read_bytes() == stated
    if same:
        for left in [*folder.glob(".tmp-*"), *(folder / WORK).rglob(".*")]:
            left.unlink(missing_ok=True)  # half-written files and unnamed arrays of a killed process
    else:
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    (folder / WORK).mkdir(exist_ok=True)  # only here, under the lock: made earlier, it would cross a removal
    write_atomic(made_of, stated)
    fsync(folder / WORK)


def is_finished(folder: Path) -> bool:
    """Whether the partial folder holds a whole dataset, and only its name is missing."""
    return (folder / MANIFEST).exists()


def publish_dataset(folder: Path, out: Path) -> None:
    """Put the finished `folder` in the place of `out`. A reader sees the old dataset, none, or the new one."""
    if (folder / WORK).exists():
        shutil.rmtree(folder / WORK)
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if (out / MANIFEST).exists():
        os.rename(out, replaced)
    elif out.exists():
        out.rmdir()  # which is empty
    os.rename(folder, out)
    fsync(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
