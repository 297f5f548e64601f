"""Breaks a rank at a named point of the real engine, by wrapping a function in its process.

Production code has no hooks for this.

`arm` runs in every rank before the command does. At its point the rank that is hit notes that it got there and then
dies, takes others along, or spoils the disk under it.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

REACHED = "reached.jsonl"
RANKS = "ranks.txt"
DISK = "runs"
"""Where a filesystem of its own may be mounted for the run."""
BALLAST = "ballast"
Victim = Literal["rank", "all", "launcher", "stop", "full disk", "file size", "read-only", "EROFS"]
"""What is hit. Also `do:` and Python statements, in which `folder` is the working folder."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the program at which something goes wrong."""

    name: str
    target: str
    """`module:function` or `module:Class.method`."""
    when: Literal["before", "after", "half"]
    """Before or after the call; half: the call has done half of its work."""
    match: str = ""
    """Pattern in the words of the arguments; empty: any call."""
    nth: int = 1
    """Which of the matching calls of this process."""
    rank: int = 0
    newest: tuple[int, ...] = (6,)
    """Step of the newest whole checkpoint afterwards; 0: none yet. Several where a thread is hit at any moment."""
    first: str = ""
    """Name of the point at which an earlier start was killed, where this one is on the way of a restart."""


def statements(point: Point, victim: Victim | str, folder: Path) -> str:
    """What a rank runs to be hit at `point`; notes about it are left in `folder`."""
    return (f"from tests.faults.inject import arm\n"
            f"arm({json.dumps(asdict(point))!r}, {victim!r}, {str(folder)!r})\n")


def arm(point_json: str, victim: Victim | str, folder: str) -> None:
    """Let this process be hit, if it is the point's rank."""
    point = Point(**json.loads(point_json))
    notes = Path(folder)
    with open(notes / RANKS, "a") as file:
        file.write(f"{os.getpid()}\n")
    if int(os.environ["RANK"]) != point.rank:
        return
    seen = 0
    lock = threading.Lock()

    def counted(*arguments: Any, **options: Any) -> bool:
        nonlocal seen
        words = " ".join(map(str, [*arguments, *options.values()]))
        if not re.search(point.match, words):
            return False
        with lock:
            seen += 1
            return seen == point.nth

    def hit() -> None:
        with open(notes / REACHED, "a") as file:
            file.write(json.dumps([point.name, victim, os.environ["RANK"]]) + "\n")
        strike(victim, notes)

    _wrap(point, counted, hit)


def _wrap(point: Point, counted: Callable[..., bool], hit: Callable[[], None]) -> None:
    module, _, path = point.target.partition(":")
    holder: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    original = getattr(holder, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        mine = counted(*arguments, **options)
        if mine and point.when == "before":
            hit()
        result = HALF[name](original, *arguments) if mine and point.when == "half" else original(*arguments, **options)
        if mine and point.when != "before":
            hit()
        return result

    setattr(holder, name, wrapped)
    for loaded in list(sys.modules.values()):  # wherever it has been imported by name
        if getattr(loaded, "__name__", "").startswith("pretrain") and vars(loaded).get(name) is original:
            setattr(loaded, name, wrapped)


def _half_file(original: Callable[..., Any], content: Any, file: Any, *rest: Any) -> None:
    original(content, file, *rest)
    os.truncate(str(file), os.path.getsize(str(file)) // 2)  # a path, or a stream that says which file it is


def _half_copy(original: Callable[..., Any], source: Path, target: Path, *rest: Any) -> None:
    original(source, target, *rest)
    os.truncate(target, os.path.getsize(target) // 2)


def _half_tree(_: Callable[..., Any], folder: Path, *__: Any) -> None:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    assert len(files) > 3
    for path in files[::2]:
        path.unlink()


def _half_line(original: Callable[..., Any], writer: Any, line: bytes) -> None:
    original(writer, line[:len(line) // 2])


HALF: dict[str, Callable[..., None]] = {"save": _half_file, "save_file": _half_file, "copy_file": _half_copy,
                                        "rmtree": _half_tree, "write": _half_line}
"""How half of a call is done, by the name of the function."""


def strike(victim: Victim | str, notes: Path) -> None:
    """Do to this rank, or to what it stands on, what `victim` says."""
    if victim.startswith("do:"):
        exec(victim.removeprefix("do:").strip(), {"folder": notes, "os": os})
    elif victim == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif victim == "launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # the kernel kills us
    elif victim in ("rank", "all"):
        if victim == "all":
            for rank in psutil.Process(os.getppid()).children():
                if rank.pid != os.getpid():
                    rank.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    elif victim == "full disk":
        fill(notes / DISK)
    elif victim == "file size":
        # What is printed is read from a file, which the limit must leave alone.
        relay = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=2, process_group=0)
        assert relay.stdin is not None
        os.dup2(relay.stdin.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    elif victim == "read-only":
        subprocess.run(["mount", "-o", "remount,bind,ro", str(notes / DISK / "tiny/checkpoints")], check=True)
    elif victim == "EROFS":
        _refuse_writes()


def fill(disk: Path, but: int = 0) -> None:
    """Leave `but` bytes free on the filesystem of `disk`."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        while (free := shutil.disk_usage(disk).free - but) > 0:
            file.write(bytes(min(1 << 20, free)))


def _refuse_writes() -> None:
    """Every call of this process that would make or change a file fails as on a read-only filesystem."""
    def refuse(*arguments: Any, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        opened = event == "open" and not path.isdigit() and not path.startswith(("/dev", "/proc")) and \
            arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime"):
            refuse(*arguments)

    sys.addaudithook(audit)
