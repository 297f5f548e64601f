"""Copies of checkpoints on a second disk, made in the background: training neither waits for them nor fails of them."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from pretrain.errors import PretrainError
from pretrain.runfolder.backup import Abandoned, back_up
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.retention import pinned

_TRIES = 3
_RETRY_S = 2.0
_GIVE_UP = 3
"""Copies that fail in a row before the status of the run says so."""
_log = logging.getLogger("pretrain")


class Mirror:
    """Copies every k-th of the saves that are offered to `PATH/NAME`. Rank 0's.

    One copy runs at a time and one may wait; where the disk is too slow for that, the newer checkpoint takes the place
    of the one that waits. A source is pinned from the moment it is offered, so that retention leaves it alone.
    """

    def __init__(self, folder: RunFolder, path: Path, every: int) -> None:
        self._folder = folder
        self._path = path
        self._every = every
        self._waiting: tuple[CheckpointRef | None, int, contextlib.ExitStack] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._abandon = threading.Event()
        self._failed_in_a_row = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """A line for the status once copies fail one after the other; empty while all is well."""
        if self._failed_in_a_row < _GIVE_UP:
            return ""
        return f"checkpoint.mirror: the last {self._failed_in_a_row} copies failed ({self._error})"

    def offer(self, ref: CheckpointRef, number: int) -> None:
        """Copy the checkpoint of save `number` (from 1) in the background, if it is its turn."""
        if number % self._every:
            return
        pin = contextlib.ExitStack()
        try:
            pin.enter_context(pinned(ref))
        except FileNotFoundError as error:  # whoever took the run over meanwhile did not keep it
            _log.warning("[DRIVE BACKUP] checkpoint #%d is not copied: %s", number, error)
            return
        self._wait_for(ref, number, pin)

    def _wait_for(self, ref: CheckpointRef | None, number: int, pin: contextlib.ExitStack) -> None:
        """Let the thread copy `ref` (None: the small files only) next."""
        with self._changed:
            if self._waiting is not None:
                _, passed, old = self._waiting
                old.close()
                _log.warning("[DRIVE BACKUP] checkpoint #%d is passed over: %s is too slow for checkpoint.mirror.every",
                             passed, self._path)
            self._waiting = (ref, number, pin)
            self._changed.notify()

    def catch_up(self, ref: CheckpointRef, number: int) -> None:
        """Copy the checkpoint of save `number`, where the process that wrote it was killed before it had.

        One that is there was proven when it was made: then only the small files are copied, and what a kill left of
        them is removed.
        """
        copy = RunFolder(self._path / self._folder.root.resolve().name)
        if not copy.final_checkpoint(ref.step, ref.fence).path.exists():
            self.offer(ref, number)
        elif number % self._every == 0:
            self._wait_for(None, number, contextlib.ExitStack())

    def close(self, wait_s: float) -> None:
        """Wait up to `wait_s` seconds for what was offered; what is not finished then is abandoned, and said so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._abandon.set()
            self._thread.join(5.0)  # a disk that no longer answers cannot be waited for

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                ref, number, pin = self._waiting
                self._waiting = None
            with pin:
                self._copy(ref, number)

    def _copy(self, ref: CheckpointRef | None, number: int) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                target = back_up(self._folder, ref, self._path, self._abandon.is_set)
                if ref is not None:
                    _log.info("[DRIVE BACKUP] Checkpoint #%d -> %s", number,
                              target.final_checkpoint(ref.step, ref.fence).path)
                self._failed_in_a_row = 0
                return
            except Abandoned:
                _log.warning("[DRIVE BACKUP] checkpoint #%d is abandoned: the run ends and %s is too slow", number,
                             self._path)
                return
            except (PretrainError, OSError) as error:
                self._error = str(error)
                _log.warning("[DRIVE BACKUP] checkpoint #%d, attempt %d of %d: %s", number, attempt, _TRIES, error)
            if attempt < _TRIES and self._abandon.wait(_RETRY_S * attempt):
                break
        self._failed_in_a_row += 1
        _log.warning("[DRIVE BACKUP] checkpoint #%d was not copied; training goes on", number)
