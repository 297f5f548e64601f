"""Which checkpoints are kept, and how one is removed while others may be reading it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.runfolder.holder import ProcessId
from pretrain.runfolder.layout import TRASH, CheckpointRef, RunFolder
from pretrain.runfolder.publish import CONDEMNED, READERS, fsync

log = logging.getLogger(__name__)
_PIN_AGE = 24 * 3600.0
"""Seconds for which the pin of a process on another machine is honoured without a sign of life."""


def to_delete(checkpoints: Sequence[CheckpointRef], *, keep_last: int, best_steps: Collection[int] = (),
              keep_multiples_of: int | None = None, pinned: Collection[CheckpointRef] = (),
              latest: CheckpointRef | None = None) -> list[CheckpointRef]:
    """The checkpoints that no rule keeps, oldest first. Pure.

    Kept are the `keep_last` newest, those of `best_steps`, those whose step is a multiple of `keep_multiples_of`
    steps, those that are `pinned`, and `latest`.
    """
    newest = sorted(checkpoints, key=lambda ref: (ref.fence, ref.step), reverse=True)
    kept = {*newest[:keep_last], *pinned, latest}
    return [ref for ref in reversed(newest) if ref not in kept and ref.step not in best_steps
            and not (keep_multiples_of and ref.step % keep_multiples_of == 0)]


@contextlib.contextmanager
def pinned(ref: CheckpointRef) -> Iterator[CheckpointRef]:
    """Keep a checkpoint from being removed while it is read. Raises FileNotFoundError where it is being removed.

    In a folder that cannot be written to no pin is left; such a reader goes on unprotected.
    """
    pin = _make_pin(ref)
    try:
        if (ref.path / READERS / CONDEMNED).exists() or not ref.path.exists():
            raise FileNotFoundError(f"{ref.path} is being removed")
        yield ref
    finally:
        if pin is not None:
            pin.unlink(missing_ok=True)


def live_pins(ref: CheckpointRef) -> list[Path]:
    """Pins of processes that still read `ref`; those of dead ones do not count."""
    with contextlib.suppress(FileNotFoundError):
        return [path for path in (ref.path / READERS).iterdir() if path.name != CONDEMNED and _alive(path)]
    return []


def remove_dead_pins(folder: RunFolder) -> None:
    """Remove what readers that were killed left in the checkpoints of a run."""
    for ref in folder.published():
        with contextlib.suppress(FileNotFoundError):
            for pin in (ref.path / READERS).iterdir():
                if pin.name != CONDEMNED and not _alive(pin):
                    pin.unlink(missing_ok=True)


def delete(ref: CheckpointRef) -> bool:
    """Remove a checkpoint; False where someone reads it.

    It is marked first, so that no reader starts between the look at the pins and the renaming away; what a kill in
    between leaves is either whole under its name or no checkpoint any more.
    """
    if live_pins(ref):
        return False
    mark = ref.path / READERS / CONDEMNED
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    if live_pins(ref):
        mark.unlink()
        return False
    trash = ref.path.with_name(f"{TRASH}{ref.path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    os.rename(ref.path, trash)
    fsync(trash.parent)
    shutil.rmtree(trash, ignore_errors=True)
    return True


def _make_pin(ref: CheckpointRef) -> Path | None:
    """Leave `.readers/HOST-PID`, with a number where this process pins the checkpoint more than once."""
    me = ProcessId.current()
    folder = ref.path / READERS
    for number in range(1000):
        pin = folder / (f"{me.host}-{me.pid}" + (f"-{number}" if number else ""))
        try:
            folder.mkdir(exist_ok=True)
            with open(pin, "x", encoding="utf-8") as file:
                json.dump(asdict(me), file)
            return pin
        except FileExistsError:
            continue
        except PermissionError:
            break
        except OSError as error:
            if not ref.path.exists():
                raise FileNotFoundError(f"{ref.path} is gone") from error
            break
    log.info("%s: cannot be pinned; it may be removed while it is read", ref.path)
    return None


def _alive(pin: Path) -> bool:
    """Whether the process of a pin may still be reading. A torn pin counts by its age."""
    try:
        age = time.time() - pin.stat().st_mtime
        try:
            process = ProcessId(**json.loads(pin.read_bytes()))
        except (ValueError, TypeError):
            return age < _PIN_AGE
        return not process.gone() and (age < _PIN_AGE or process.host == ProcessId.current().host)
    except FileNotFoundError:
        return False
