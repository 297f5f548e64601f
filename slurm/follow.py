"""Logs of a job by rank, and following them from one start to the next."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder
from slurm.history import read_history, read_submissions

_EVERY_S = 0.5
_ASK_EVERY_S = 5.0
"""Seconds between questions to the controller, which serves everybody."""


def sources(folder: RunFolder, rank: int | None) -> list[tuple[str, Path]]:
    """(prefix, file) of the newest start: of `rank`, or else of the job's own script and rank 0."""
    logs = folder.slurm_dir / "log"
    history = read_history(folder)
    submitted = read_submissions(folder)
    job = history[-1].job if history else submitted[-1].jobs[0] if submitted else None
    if job is None:
        raise UserError(f"{folder.root}: no job of this run is known")
    ranks = logs / f"{job}-{history[-1].restart if history else 0}"
    if rank is not None:
        return [("", ranks / f"rank-{rank}.log")]
    return [("job    | ", logs / f"{job}.out"), ("rank 0 | ", ranks / "rank-0.log")]


@dataclass
class Tail:
    """Lines of one growing file."""

    path: Path
    position: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def lines(self, last: bool = False) -> Iterator[str]:
        """Complete lines since the last call; with `last` also one without an end."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                data = file.read()
        except FileNotFoundError:
            return
        self.position += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        if last and self._rest:
            yield self._rest.decode(errors="replace")
            self._rest = b""


def follow(find: Callable[[], list[tuple[str, Path]]], live: Callable[[], bool], *, forever: bool) -> Iterator[str]:
    """Lines of the files that `find` names, now and then anew: a restart writes to others. Ends once not `live`.

    Without `forever`, what is there now and no more.
    """
    tails: dict[Path, Tail] = {}
    going_on, asked = forever, time.monotonic()
    while True:
        if going_on and time.monotonic() - asked > _ASK_EVERY_S:
            asked = time.monotonic()
            with contextlib.suppress(UserError):  # a controller that is being restarted
                going_on = live()
        for prefix, path in find():
            for line in tails.setdefault(path, Tail(path)).lines(last=not going_on):
                yield prefix + line
        if not going_on:
            return
        time.sleep(_EVERY_S)
