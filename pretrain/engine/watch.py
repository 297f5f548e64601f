"""Finds the rank that has stopped making progress, and ends the run with exit code 6 and the stacks of all ranks.

A thread of every rank writes `heartbeat/fF/rank-N.json`: how often it has beaten, and where training stands. Rank 0
reads all of them, the others read rank 0's, so that a rank 0 that hangs is noticed too. What counts is that a file
changes, not the time it names: clocks of machines need not agree. Files, because the store of the ranks lives in rank
0's process, and a collective is the very thing that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from pretrain.engine.claim import Claim
from pretrain.engine.ranks import node_name
from pretrain.engine.trainer import Trainer
from pretrain.errors import DataCorruption, ExitCode
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status

_VERDICT = "verdict"
SAVE_PHASE = "save"
"""The phase of a rank that waits for a checkpoint to be written."""
_log = logging.getLogger("pretrain")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the training thread of a rank stands."""

    k: int
    step: int
    moves: int
    """Rises with every phase entered or left and every forward: a long evaluation is progress."""
    phase: str
    written: int = 0
    """Rises while a checkpoint is being written: for those who wait for it that is progress, whoever writes."""


@dataclass(slots=True)
class _Seen:
    """What was last read of a rank, and when it last changed (monotonic seconds)."""

    beat: int
    place: Place
    beaten: float
    moved: float
    wrote: float = -math.inf


def watching(trainer: Trainer, claim: Claim) -> contextlib.AbstractContextManager[None]:
    """Watch over a run while it trains, as `launch.hang_timeout` says. Collective."""
    timeout_s = trainer.config.launch.hang_timeout
    if timeout_s is None:
        return contextlib.nullcontext()
    world = trainer.engine.world
    fence = world.broadcast(claim.lease.fence if claim.lease is not None else 0)

    def where() -> Place:
        clock, keeper = trainer.reporter.clock, trainer.keeper
        waits = clock.current == SAVE_PHASE and keeper.ended  # has done its part of what the others are at
        return Place(trainer.state.k, trainer.state.step, clock.moves + trainer.engine.forwards + waits, clock.current,
                     keeper.progress)

    return Watch(claim.folder, fence, world.rank, world.size, timeout_s, where,
                 trainer.reporter.clock.totals).watching()


class Watch:
    """The watching thread of one rank."""

    def __init__(self, folder: RunFolder, fence: int, rank: int, size: int, timeout_s: float,
                 where: Callable[[], Place], seconds: Mapping[str, float] | None = None) -> None:
        """`seconds`: time spent per phase so far, kept up to date by the training thread."""
        self._folder, self._rank, self._size, self._timeout_s, self._where = folder, rank, size, timeout_s, where
        self._fence = fence
        self._seconds = seconds
        self._beats = folder.heartbeat_dir(fence)
        self._stacks = folder.hang_dir(fence)
        self._every = min(10.0, timeout_s / 10)
        self._beat = 0
        self._seen: dict[int, _Seen] = {}
        self._stop = threading.Event()
        self._fired = threading.Event()
        self._leads = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the body trains. Once a hang is found this does not return: the process ends with code 6."""
        self._beats.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            for old in self._beats.parent.iterdir():
                if old != self._beats:
                    shutil.rmtree(old, ignore_errors=True)
        thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            if self._fired.is_set():  # what this rank fails of now is the end of the others
                threading.Event().wait()
            thread.join()
            for path in (self._file(self._rank), self._times_file()):
                with contextlib.suppress(OSError):  # a disk that refuses it may be what the run ends of
                    path.unlink()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._write()
                line = self._hang(time.monotonic())
            except OSError as error:
                _log.warning("%s: hang detection cannot use it (%s)", self._beats, error)
                continue
            if line is not None:
                self._fired.set()
                self._leave(line)

    def _file(self, rank: int) -> Path:
        return self._beats / f"rank-{rank}.json"

    def _times_file(self) -> Path:
        return self._beats / f"times-{self._rank}.json"

    def _write(self) -> None:
        self._beat += 1
        place = self._where()
        temporary = self._file(self._rank).with_suffix(".tmp")
        temporary.write_text(json.dumps([self._beat, *astuple(place)]))
        os.replace(temporary, self._file(self._rank))
        if self._seconds is not None:
            temporary.write_text(json.dumps({"node": node_name(), "step": place.step, "seconds": dict(self._seconds)}))
            os.replace(temporary, self._times_file())

    def _hang(self, now: float) -> str | None:
        """The line to end with, None while all is well."""
        verdict = self._beats / _VERDICT
        with contextlib.suppress(FileNotFoundError):
            return verdict.read_text() or None  # empty: being written this moment
        for rank in range(self._size) if self._rank == 0 else (0,):
            self._look(rank, now)
        silent = [r for r, seen in self._seen.items() if now - seen.beaten > max(5.0, 3 * self._every)]
        writing = any(now - seen.wrote <= self._timeout_s for seen in self._seen.values())
        stuck = {r: seen for r, seen in self._seen.items() if now - seen.moved > self._timeout_s
                 and not (writing and seen.place.phase == SAVE_PHASE)}
        if self._rank:
            stuck = {r: seen for r, seen in stuck.items() if r in silent}
        if not stuck:
            return None
        # Ranks come to rest within a moment of each other: the first past the limit need not be the one to blame.
        resting = {r: seen for r, seen in self._seen.items() if now - seen.moved > self._timeout_s / 2}
        late = [r for r in resting if r in silent]
        if not late:
            behind = min((seen.place.k, seen.place.moves) for seen in resting.values())
            late = [r for r, seen in resting.items() if (seen.place.k, seen.place.moves) == behind]
        line = "; ".join(self._told(r, r in silent, now) for r in late[:8])
        with contextlib.suppress(FileExistsError), open(verdict, "x") as file:
            file.write(line)
            self._leads = True
        return line

    def _look(self, rank: int, now: float) -> None:
        try:
            beat, *place = json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            if rank in self._seen:
                return
            beat, place = 0, [0, 0, 0, "other"]
        new = Place(*place)
        seen = self._seen.setdefault(rank, _Seen(beat, new, now, now))
        if beat != seen.beat:
            seen.beat, seen.beaten = beat, now
        if new.written != seen.place.written:
            seen.wrote = now
        if replace(new, written=seen.place.written) != seen.place:  # writing in the background is no training
            seen.moved = now
        seen.place = new

    def _told(self, rank: int, silent: bool, now: float) -> str:
        seen = self._seen[rank]
        what = "its process does not answer" if silent else "its process is alive"
        since = max(seen.moved, seen.wrote) if seen.place.phase == SAVE_PHASE else seen.moved
        return (f"rank {rank} has made no progress for {now - since:.0f} s: after step {seen.place.step}, batch "
                f"{seen.place.k}, phase {seen.place.phase}; {what} (launch.hang_timeout {self._timeout_s:g} s)")

    def _leave(self, line: str) -> None:
        """Write down what is known and end the process, after the other ranks had time to do the same."""
        deadline = time.monotonic() + self._every + 3.0
        with contextlib.suppress(OSError):
            self._stacks.mkdir(exist_ok=True)
            with open(self._stacks / f"rank-{self._rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        _log.error("%s; stacks of rank %d: %s", line, self._rank, self._stacks / f"rank-{self._rank}.txt",
                   extra={"console": False})
        if self._leads:
            print(f"error: {line}; stacks: {self._stacks}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError, DataCorruption):
                status = Status.read(self._folder) or Status(self._fence)
                status.ended(ExitCode.HANG, "hang", line).write(self._folder)
        time.sleep(max(0.0, deadline - time.monotonic()))
        os._exit(int(ExitCode.HANG))
