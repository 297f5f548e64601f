"""Which rank this process is, and where the ranks of a job meet. Asks no Slurm program and imports no torch.

Under srun rank 0 takes a free port of its own machine and keeps it open from then on, so that no two jobs can meet on
one port. The others learn it from a small file in the run folder, which every machine sees anyway.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.errors import UserError
from pretrain.runfolder.publish import write_text_atomic

LISTEN_FD = "PRETRAIN_LISTEN_FD"
"""Environment variable: number of the inherited socket on which rank 0 opens the rendezvous."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": "0"}
"""Environment of the only rank of a run, which meets nobody."""
_LAUNCHED = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE", "master_port": "MASTER_PORT"}
_STEP = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world_size": "SLURM_NTASKS"}
_PART = re.compile(r"([^\[\],]*)(?:\[([^\]]*)\])?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_NODES = 100_000


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """Who this process is."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    """0: not agreed upon yet; see `meet`."""


def rank_environment(environment: Mapping[str, str]) -> RankEnvironment | None:
    """Read who we are from RANK (our launcher, torchrun, deepspeed) or SLURM_* (srun); None for a process of its own.

    Under srun MASTER_ADDR and MASTER_PORT count where they are set; else the address is the first machine of the step
    and the port is open. Raises UserError naming the variable where the environment is half set.
    """
    if "RANK" in environment:
        own = RankEnvironment(**_numbers_of(_LAUNCHED, environment), master_addr=environment.get("MASTER_ADDR", ""))
        if not own.master_addr:
            raise UserError("environment: MASTER_ADDR is not set; it is the host of rank 0")
        names = _LAUNCHED
    elif "SLURM_PROCID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        port = {"master_port": "MASTER_PORT"} if environment.get("MASTER_PORT") else {}
        values = {"master_port": 0, **_numbers_of({**_STEP, **port}, environment)}
        own = RankEnvironment(**values, master_addr=environment.get("MASTER_ADDR") or _first_node(environment))
        names = _STEP
    else:
        return None
    if own.rank >= own.world_size:
        raise UserError(f"environment: {names['rank']} is {own.rank}, which is not below {names['world_size']} "
                        f"{own.world_size}")
    return own


def _numbers_of(names: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, int]:
    values = {}
    for key, name in names.items():
        text = environment.get(name)
        if text is None or not text.isdigit():
            found = "not set" if text is None else repr(text)
            raise UserError(f"environment: {name} is {found}; a launched rank needs {', '.join(names.values())} "
                            "as numbers and MASTER_ADDR")
        values[key] = int(text)
    return values


def _first_node(environment: Mapping[str, str]) -> str:
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed:
        raise UserError("environment: SLURM_STEP_NODELIST is not set, so that the machine of rank 0 is not known; "
                        "set MASTER_ADDR")
    return expand_nodes(listed)[0]


def node_name() -> str:
    """This machine, as Slurm calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def expand_nodes(text: str) -> list[str]:
    """Machines of a Slurm node list: `n[1-3,07],gpu-a` -> n1, n2, n3, n07, gpu-a. Raises UserError.

    Widths of numbers are kept; a name may hold several bracketed parts, of which the last changes fastest.
    """
    names: list[str] = []
    for word in _split(text):
        parts = [[head + tail for tail in tails] for head, tails in _parts(word, text)]
        names += ["".join(combination) for combination in itertools.product(*parts)]
        if len(names) > _MOST_NODES:
            raise UserError(f"node list {text!r}: names more than {_MOST_NODES} machines")
    if not names or not all(names):
        raise UserError(f"node list {text!r}: cannot be read; n[1-3],gpu-a would be right")
    return names


def _split(text: str) -> Iterator[str]:
    """At commas outside of brackets."""
    depth, word = 0, ""
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield word
            word = ""
        else:
            word += letter
    yield word


def _parts(word: str, whole: str) -> Iterator[tuple[str, list[str]]]:
    """(text, what may follow it) of each bracketed part."""
    position = 0
    while position < len(word):
        match = _PART.match(word, position)
        if match is None or match.end() == position:
            raise UserError(f"node list {whole!r}: cannot be read at {word[position:]!r}")
        position = match.end()
        yield match.group(1), [""] if match.group(2) is None else [
            number for item in match.group(2).split(",") for number in _numbers(item, whole)]


def _numbers(item: str, whole: str) -> Iterator[str]:
    match = _RANGE.fullmatch(item)
    if match is None:
        raise UserError(f"node list {whole!r}: {item!r} is no number or range")
    first, last = match.group(1), match.group(2) or match.group(1)
    if int(last) - int(first) > _MOST_NODES:
        raise UserError(f"node list {whole!r}: {item!r} names more than {_MOST_NODES} machines")
    yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def meet(own: RankEnvironment, folder: Path, environment: Mapping[str, str], *, timeout_s: float) -> RankEnvironment:
    """`own` with the port of rank 0, where that is still open. Rank 0 listens on it from now on (LISTEN_FD).

    `folder` is seen by all machines; rank 0 makes it. Nothing is written where a launcher has said where to meet, or
    where there is nobody to meet. Raises UserError where rank 0 has not come within `timeout_s`.
    """
    if own.master_port or own.world_size == 1 or "RANK" in environment:
        return own
    place = folder / "-".join(environment.get(key) or "0" for key in
                              ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return replace(own, master_port=_open(place) if own.rank == 0 else _find(own, place, timeout_s))


def forget_meeting(folder: Path) -> None:
    """All ranks have met; rank 0 removes what `meet` left."""
    with contextlib.suppress(OSError):
        for place in folder.iterdir():
            place.unlink(missing_ok=True)


def _open(place: Path) -> int:
    try:
        dual = socket.has_dualstack_ipv6()
        listener = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=1024,
                                        dualstack_ipv6=dual)
        place.parent.mkdir(parents=True, exist_ok=True)
        port = int(listener.getsockname()[1])
        write_text_atomic(place, f"{port}\n")
    except OSError as error:
        raise UserError(f"{place}: rank 0 cannot say where it is ({error.strerror}); make the run folder writable, or "
                        "set MASTER_PORT") from error
    os.environ[LISTEN_FD] = str(listener.detach())
    return port


def _find(own: RankEnvironment, place: Path, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            os.listdir(place.parent)  # a network filesystem looks again, instead of remembering that it was not there
            return int(place.read_text())
        if time.monotonic() > deadline:
            error = UserError(f"rank {own.rank} on {socket.gethostname()}: rank 0 did not come to {own.master_addr} "
                              f"within {timeout_s:.0f} s (launch.timeout), or its machine sees another {place.parent}")
            error.agreed = own.rank != 1  # all miss it; rank 1 tells the user
            raise error
        time.sleep(0.05)
