"""SHA-256 of the files of a checkpoint: of large ones piece by piece, so that one file keeps several cores busy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

PIECE = 64 << 20
"""Bytes of a piece."""
Digest = str | tuple[str, ...]
"""In hexadecimal: of a whole file, or of each of its consecutive pieces where it has more than one."""
_BUFFER = 1 << 20
_SMALL = 1 << 16
"""Bytes up to which another thread does not pay."""


def threads_of_a_rank() -> int:
    """Threads with which one rank of several on this machine may work on files: its share of the cores, 4 at most."""
    return max(1, min(4, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def hash_file(path: Path) -> str:
    """SHA-256 of a whole file in hexadecimal; other threads run meanwhile."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> Digest:
    """The digest of a file as it stands."""
    size = path.stat().st_size
    return hash_file(path) if size <= PIECE else tuple(_hash_range(path, start) for start in range(0, size, PIECE))


def digests(folder: Path, like: Mapping[str, Digest]) -> dict[str, Digest]:
    """The digests of files of a folder by name, in pieces where those given are; one thread a core."""
    with ThreadPoolExecutor(_cores(), "hash") as pool:
        waiting = {name: list(_submitted(pool, folder / name, isinstance(digest, str)))
                   for name, digest in like.items()}
        found = {name: tuple(part.result() for part in parts) for name, parts in waiting.items()}
    return {name: parts[0] if isinstance(like[name], str) else parts for name, parts in found.items()}


class PieceHasher:
    """The digest of a file from the bytes that are written to it, taken by the threads of `pool`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pieces = [hashlib.sha256()]
        self._filled = 0

    def update(self, data: memoryview) -> list[Future[None]]:
        """Take in the next bytes; `data` must stay as it is until the futures that are returned are done."""
        running = []
        while len(data):
            if self._filled == PIECE:
                self._pieces.append(hashlib.sha256())
                self._filled = 0
            part, data = data[:PIECE - self._filled], data[PIECE - self._filled:]
            self._filled += len(part)
            if len(part) > _SMALL:
                running.append(self._pool.submit(self._pieces[-1].update, part))
            else:
                self._pieces[-1].update(part)
        return running

    def digest(self) -> Digest:
        """Of all bytes so far."""
        found = tuple(piece.hexdigest() for piece in self._pieces)
        return found[0] if len(found) == 1 else found


def _submitted(pool: ThreadPoolExecutor, path: Path, whole: bool) -> Iterator[Future[str]]:
    if whole:
        yield pool.submit(hash_file, path)
        return
    for start in range(0, path.stat().st_size, PIECE):
        yield pool.submit(_hash_range, path, start)


def _hash_range(path: Path, start: int) -> str:
    """SHA-256 of the piece that begins at byte `start`."""
    digest, left, buffer = hashlib.sha256(), PIECE, memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:min(left, _BUFFER)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
