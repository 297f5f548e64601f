"""A rank's part of a checkpoint on its way to the disk, in a thread: written, hashed, flushed. No collectives here."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrain.errors import UserError
from pretrain.runfolder.hashing import Digest, PieceHasher, digest_of, threads_of_a_rank
from pretrain.runfolder.publish import fsync

_PIECE = 16 << 20
"""Bytes between two signs of progress."""
_FLUSHED = 64 << 20
"""Bytes between two flushes to the disk, which go on beside the writing."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors names a system error."""


class HashedFile:
    """A new file whose SHA-256 is of the bytes that were given to it, taken beside the writing of them.

    So what a disk or its cache makes of them afterwards does not pass for right. The disk is made to take them in from
    the first piece on, instead of all at the end. The writing half of a binary stream, as `torch.save` takes it.
    """

    def __init__(self, path: Path, progress: Callable[[], None] = lambda: None, hashers: int = 1) -> None:
        """`hashers`: threads that hash."""
        self.error: OSError | None = None
        """The first thing that went wrong. What is written afterwards is dropped: torch still closes its archive."""
        self._path = path
        self._progress = progress
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._beside = ThreadPoolExecutor(hashers, "hash")
        self._hash = PieceHasher(self._beside)
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def __str__(self) -> str:
        return str(self._path)

    def write(self, data: Any) -> int:
        """Take in `data`, whole. Raises OSError the first time that it cannot be written."""
        view = memoryview(data).cast("B")
        if self.error is not None:
            return len(view)
        hashed = self._hash.update(view)
        try:
            done = 0
            while done < len(view):
                count = self._file.write(view[done:done + _PIECE])
                done += count
                self._flush_beside(count)
                self._progress()
        except OSError as error:
            self.error = error
            raise
        finally:
            wait(hashed)
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> Digest:
        """Flush to the disk, and return the digest. Raises the OSError of an earlier write, or its own."""
        self._beside.shutdown()
        self._flusher.shutdown()
        with self._file as file:
            if self.error is not None:
                raise self.error
            if self._flushing is not None:
                self._flushing.result()
            os.fsync(file.fileno())
        return self._hash.digest()

    def _flush_beside(self, count: int) -> None:
        """`count` more bytes are written. Raises the OSError of an earlier flush, which the system tells only once."""
        self._unflushed += count
        if self._unflushed < _FLUSHED or not (self._flushing is None or self._flushing.done()):
            return
        if self._flushing is not None:
            self._flushing.result()
        self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
        self._unflushed = 0


class PartFile(Protocol):
    """A file that is to be written: its name relative to the checkpoint, and the bytes of its content, about."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    def write(self, path: Path, progress: Callable[[], None], hashers: int) -> Digest:
        """Write it to `path`, flushed; returns its digest. Raises OSError, SafetensorError."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """State as `torch.save` writes it."""

    name: str
    state: Any
    nbytes: int

    def write(self, path: Path, progress: Callable[[], None], hashers: int) -> Digest:
        """Hashed on its way to the file."""
        file = HashedFile(path, progress, hashers)
        try:
            torch.save(self.state, file)
        except Exception:
            if file.error is None:  # else torch has told of it in its own words
                raise
        return file.close()


@dataclass(frozen=True, slots=True)
class TextFile:
    """UTF-8."""

    name: str
    text: str

    @property
    def nbytes(self) -> int:
        """Of the text, if it is ASCII."""
        return len(self.text)

    def write(self, path: Path, progress: Callable[[], None], hashers: int) -> Digest:
        """Hashed on its way to the file."""
        file = HashedFile(path, progress, hashers)
        file.write(self.text.encode())
        return file.close()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Tensors by name, as safetensors."""

    name: str
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path, progress: Callable[[], None], hashers: int) -> Digest:
        """Hashed as it is read back: the library takes no stream."""
        save_file(self.tensors, path)
        fsync(path)
        progress()
        return digest_of(path)


class Writing:
    """The thread that writes a rank's part. Each file is let go of once it is written."""

    def __init__(self, folder: Path, files: Sequence[PartFile], *, beside: bool) -> None:
        """Start to write `files` below `folder`, where all their folders are.

        `beside`: training goes on meanwhile, and only one thread hashes.
        """
        self.progress = 0
        """Rises while the disk takes in what it is given."""
        self._folder = folder
        self._files = list(files)
        self._hashers = 1 if beside else threads_of_a_rank()
        self._hashes: dict[str, Digest] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether everything is written, or failed."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for at most so long; whether it has ended."""
        self._thread.join(seconds)
        return self.ended

    @property
    def failed(self) -> bool:
        """Whether something could not be written. Asked once it has ended."""
        return self._error is not None

    @property
    def unwritten(self) -> int:
        """Bytes that are not on the disk, about. Asked once it has ended."""
        if not self._files:
            return 0
        begun = self._folder / self._files[0].name
        return max(0, sum(file.nbytes for file in self._files) - (begun.stat().st_size if begun.exists() else 0))

    def hashes(self) -> dict[str, Digest]:
        """The digest of every file by its name. Asked once it has ended; raises what it failed of."""
        if self._error is not None:
            raise self._error
        return self._hashes

    def explain(self, unwritten: int) -> None:
        """Let `hashes` raise one line instead, where the disk is the reason.

        `unwritten`: bytes that no rank could write; told before anything is removed.
        """
        if self._error is None or system_error(self._error) is None:
            return
        free = shutil.disk_usage(self._folder).free if self._folder.exists() else 0
        self._error = unwritable(self._error, self._folder / self._files[0].name, max(unwritten - free, 1))

    def _run(self) -> None:
        try:
            while self._files:
                file = self._files[0]
                self._hashes[file.name] = file.write(self._folder / file.name, self._advance, self._hashers)
                del self._files[0]
                del file
        except Exception as error:
            self._error = error

    def _advance(self) -> None:
        self.progress += 1


def unwritable(error: Exception, path: Path | None = None, missing: int | None = None) -> UserError:
    """The error of a checkpoint whose file `path` (None: the error's) met a system error; `missing`: bytes it lacks."""
    number = system_error(error) or 0
    what = f"{path or getattr(error, 'filename', None)}: cannot be written ({os.strerror(number)})"
    if number not in _FULL:
        return UserError(f"{what}; checkpoints before this one stand as they were")
    lack = f"{missing:,} more bytes are needed there; " if missing is not None else ""
    return UserError(f"{what}: {lack}make room, or keep fewer checkpoints (checkpoint.keep_last); those before this "
                     "one stand as they were")


def system_error(error: Exception) -> int | None:
    """The number of the system error behind an error, if there is one."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError):
        found = _OS_ERROR.search(str(error))
        return int(found.group(1)) if found else None
    return None
