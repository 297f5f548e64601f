"""Datasets that lie elsewhere: their shards are fetched when they are first needed and kept in a bounded cache.

A dataset is addressed by `http://`, `https://` or `pipe:` and a command with {name} in it, whose output is the file
(`pipe:aws s3 cp s3://bucket/data/{name} -`). The command is run without a shell.

What holds: batch k is the very one of the same dataset on a local disk, for any ranks, workers and restarts, and any
batch is still reached at once. Every file is held to its hash before it is used; what arrives damaged is fetched again
and then refused. What does not: the first touch of a shard waits for all of it. The plain order touches shards at
random, so a cache smaller than the dataset fetches most of it again in every epoch; `data.order` with lanes and chunks
of about a shard reads each shard once an epoch and gives up what it states.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.files import temporary_name
from pretrain.errors import DataCorruption, UserError

SCHEMES = ("http://", "https://", "pipe:")
ATTEMPTS = 4
TIMEOUT_SECONDS = 60.0
_BLOCK = 1 << 20


class RemoteFolder:
    """A folder elsewhere and the local one that its files are fetched to. Any number of processes may share both."""

    def __init__(self, url: str, cache: Path, max_bytes: int, pause: float = 1.0) -> None:
        """`max_bytes` bounds the shards in the cache, not the tables; `pause` is the wait before the second attempt."""
        self.url, self.cache, self.max_bytes, self.pause = url, cache, max_bytes, pause
        if url.startswith("pipe:") and "{name}" not in url:
            raise UserError(f"{url}: a pipe needs {{name}} where the name of the file belongs")
        cache.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str, fault: Callable[[Path], str | None] = lambda _: None) -> Path:
        """The local file, fetched unless it is there. `fault` says what is wrong with it in one line, or None.

        Raises UserError where it cannot be had, DataCorruption where it arrives damaged every time.
        """
        path = self.cache / name
        with self._alone(name):
            if path.exists():
                os.utime(path)
                return path
            found: str | None = None
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(self.pause * 2 ** (attempt - 1))
                temporary = temporary_name(path)
                try:
                    self._copy(name, temporary)
                except (OSError, subprocess.SubprocessError) as error:
                    found = f"{self._place(name)}: cannot be fetched ({error})"
                    missing = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)
                    if missing or attempt == ATTEMPTS - 1:
                        raise UserError(found) from None
                    continue
                found = fault(temporary)
                if found is None:
                    os.replace(temporary, path)
                    return path
                temporary.unlink()
            raise DataCorruption(f"{self._place(name)}: arrives damaged ({found})")

    def make_room(self, keep: set[str]) -> None:
        """Remove the shards used least recently until the cache is within its bound. Mapped ones stay readable."""
        shards = []
        for path in self.cache.glob("[!.]*.tar"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                shards.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                return
            if path.name not in keep:
                path.unlink(missing_ok=True)
                path.with_suffix(".idx").unlink(missing_ok=True)
                total -= size

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process fetches a file, the others wait for it."""
        with (self.cache / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _place(self, name: str) -> str:
        return self.url.replace("{name}", name) if self.url.startswith("pipe:") else f"{self.url.rstrip('/')}/{name}"

    def _copy(self, name: str, target: Path) -> None:
        """Write a file elsewhere to `target`. Raises OSError or SubprocessError."""
        with target.open("wb") as file:
            if self.url.startswith("pipe:"):
                command = [word.replace("{name}", name) for word in shlex.split(self.url.removeprefix("pipe:"))]
                done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                      timeout=600, check=False)
                if done.returncode:
                    said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
                    raise OSError(f"{command[0]} left with {done.returncode}: {said}")
                return
            place = f"{self.url.rstrip('/')}/{urllib.parse.quote(name)}"
            with urllib.request.urlopen(place, timeout=TIMEOUT_SECONDS) as answer:
                expected, size = answer.headers.get("Content-Length"), 0
                while block := answer.read(_BLOCK):
                    file.write(block)
                    size += len(block)
            if expected is not None and size != int(expected):
                raise OSError(f"{size} of {expected} bytes arrived")


def is_remote(path: str) -> bool:
    """Whether a path of a config names a dataset elsewhere."""
    return path.startswith(SCHEMES)
