"""A second copy of a run on another disk: a run folder of its own, from which the run can be read or gone on with.

    DEST/NAME/  checkpoints/step-N.fF/  as published, held to its manifest
                checkpoints/latest      the newest copy
                lease/F/holder.json     who wrote what; released, so that a start in the copy asks nobody
                config.yaml  environment.json  deepspeed.json  metrics.jsonl  status.json

Nothing that stands in a copy is ever deleted from here, and no checkpoint in it is replaced.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.holder import Holder, fences
from pretrain.runfolder.layout import COPYING, LATEST, CheckpointRef, RunFolder, abandoned_copies
from pretrain.runfolder.publish import (
    MANIFEST,
    Manifest,
    hash_file,
    publish_dir,
    require_space,
    temporary_writer,
    write_json_atomic,
)
from pretrain.runfolder.retention import pinned
from pretrain.runfolder.status import Status

_PIECE = 8 << 20
log = logging.getLogger(__name__)


class Abandoned(Exception):
    """A copy was given up because its caller asked for that; nothing of it is left."""


def back_up(folder: RunFolder, ref: CheckpointRef | None, destination: Path,
            abandon: Callable[[], bool] = lambda: False) -> RunFolder:
    """Copy `ref` (None: no checkpoint) and the small files of the run to `destination`/NAME; returns that folder.

    The copy is held to the manifest (sizes and SHA-256, read back), flushed and renamed into place; one that stands
    there already, whole, is not copied again. The source is pinned meanwhile. Where `abandon` turns true between two
    pieces of a file, the copy is removed and Abandoned raised. Raises DataCorruption where source or copy do not have
    the bytes of the manifest; UserError where the disk is too full, or the folder there is a run that went on by itself
    or another run; OSError.
    """
    target = RunFolder(destination / folder.root.resolve().name)
    if target.root.resolve() == folder.root.resolve():
        raise UserError(f"{destination}: holds the run itself; a backup goes to another folder")
    _same_run(folder, target)
    target.checkpoints_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    if ref is not None:
        with pinned(ref):
            _copy_checkpoint(ref, target, abandon)
    newest = max(target.published(), key=lambda other: (other.fence, other.step), default=None)
    if newest is not None:  # also one whose copier was killed before it pointed at it
        target.write_pointer(LATEST, newest)
    copy_records(folder, target)
    status = Status.read(folder)
    if status is not None:
        write_json_atomic(target.status_file, asdict(status))
    return target


def _same_run(folder: RunFolder, target: RunFolder) -> None:
    """Raise UserError where the folder at the destination has holders that this run has not had."""
    for fence in fences(target.lease_dir):
        there, here = (Holder.read(f.lease_dir / str(fence)) for f in (target, folder))
        if there is not None and (here is None or here.process != there.process):
            raise UserError(f"{target.root}: is another run, or a copy that has gone on by itself (fence {fence}); "
                            "choose another folder")


def _copy_checkpoint(ref: CheckpointRef, target: RunFolder, abandon: Callable[[], bool]) -> None:
    manifest = Manifest.read(ref.path)
    copy = target.final_checkpoint(ref.step, ref.fence)
    if copy.path.exists():
        _stands_already(ref, copy)
        return
    require_space(target.checkpoints_dir, sum(entry.bytes for entry in manifest.files.values()))
    temporary = copy.path.with_name(f"{COPYING}{socket.gethostname()}-{os.getpid()}-{copy.path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name in [*manifest.files, MANIFEST]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(ref.path / name, temporary / name, abandon)
        problems = manifest.verify(temporary)
        if problems:
            at_source = manifest.verify(ref.path)
            raise DataCorruption(at_source[0] if at_source else f"the copy is not what was read: {problems[0]}")
        if abandon():
            raise Abandoned
        publish_dir(temporary, copy.path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stands_already(ref: CheckpointRef, copy: CheckpointRef) -> None:
    """Raise unless `copy` is `ref`, whole."""
    if hash_file(ref.path / MANIFEST) != hash_file(copy.path / MANIFEST):
        raise UserError(f"{copy.path}: is another checkpoint of that name; choose another folder")
    problems = Manifest.read(copy.path).verify(copy.path)
    if problems:
        raise DataCorruption(f"{problems[0]}; move this copy aside and it is made again")


def copy_file(source: Path, target: Path, abandon: Callable[[], bool] = lambda: False) -> None:
    """Copy a file to where there is none yet, in pieces. Raises Abandoned where `abandon` turns true between two."""
    with open(source, "rb") as read, open(target, "xb") as write:
        while piece := read.read(_PIECE):
            if abandon():
                raise Abandoned
            write.write(piece)


def _remove_leftovers(target: RunFolder) -> None:
    """Remove what processes that are gone left half-copied, and the temporary files of those of this machine.

    The name of a small file does not tell the machine: another one that is writing it this moment would fail, and try
    again.
    """
    for path in abandoned_copies(target.checkpoints_dir):
        shutil.rmtree(path, ignore_errors=True)
    for parent in (target.root, target.checkpoints_dir, *target.lease_dir.glob("*/")):
        for path in parent.glob(".*.tmp"):
            writer = temporary_writer(path.name)
            if writer is not None and not psutil.pid_exists(writer):
                path.unlink(missing_ok=True)


def copy_records(folder: RunFolder, target: RunFolder) -> None:
    """Everything small but the status: what the run is, who wrote what, its metrics."""
    for fence in fences(folder.lease_dir):
        holder = Holder.read(folder.lease_dir / str(fence))
        if holder is not None:
            own = target.lease_dir / str(fence)
            own.mkdir(parents=True, exist_ok=True)
            replace(holder, released=holder.released or holder.since).write(own)
    for path in (folder.config_file, folder.environment_file, folder.root / "deepspeed.json", folder.lineage_file,
                 folder.parent_config_file, folder.metrics_jsonl):
        if path.is_file():
            _replace(path, target.root / path.name, lines=path == folder.metrics_jsonl)


def _replace(source: Path, target: Path, *, lines: bool) -> None:
    """Replace `target` by what `source` holds now; of a file that grows (`lines`), whole lines only."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            if lines:
                file.truncate(_whole_lines(temporary))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _whole_lines(path: Path) -> int:
    """Bytes up to and with the last line feed."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while size:
            start = max(0, size - 65536)
            file.seek(start)
            at = file.read(size - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            size = start
    return 0
