"""Complete or invisible: how files and folders of a run come into being.

Everything is written under a temporary name in the folder where it will stand, flushed to the disk, and renamed. A
reader therefore sees the old content, the new content, or nothing; never a part. The name becomes durable with the
flush of the folder that holds it, which is why every rename is followed by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.hashing import Digest, digest_of, digests
from pretrain.runfolder.hashing import hash_file as hash_file

MANIFEST = "manifest.json"
REPLACED = ".replaced-"
"""Prefix of a published folder that is being replaced."""
READERS = ".readers"
"""Folder inside a checkpoint in which readers pin it; not part of what the manifest describes."""
CONDEMNED = ".condemned"
"""Mark among the pins: this checkpoint is about to be removed, no new reader may start."""
_MANIFEST_FORMAT = 2
_READABLE = (1, 2)
"""Formats that can be read. Those of 1 have one hash a file, however large."""
_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk. On several nodes each rank flushes the files it wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), so that a reader or a crash finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON. NaN and infinities are refused with ValueError: they are no JSON."""
    write_text_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as the JSON of all our files: indented, without NaN and infinities, which are refused with ValueError."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def is_temporary(name: str) -> bool:
    """Whether `name` is what `write_text_atomic` leaves behind when its process is killed."""
    return temporary_writer(name) is not None


def temporary_writer(name: str) -> int | None:
    """The process that is, or was, writing the temporary file `name`; None where it is no such file."""
    match = _TEMPORARY.fullmatch(name)
    return int(match.group(1)) if match else None


def publish_dir(temporary: Path, final: Path) -> None:
    """Flush a finished folder and give it its name in one step.

    Raises FileExistsError where `final` is there already: what is published is never replaced.
    """
    for folder, _, names in os.walk(temporary, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))
    if final.exists():
        raise FileExistsError(f"{final} is published already")
    os.rename(temporary, final)
    fsync(final.parent)


def replace_dir(temporary: Path, final: Path) -> None:
    """Flush a finished folder and put it in the place of `final`, which is kept aside until then.

    A kill in between leaves the old one under a name that `restore_replaced` gives back.
    """
    aside = final.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.rename(final, aside)
    publish_dir(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(parent: Path) -> None:
    """Finish what a killed `replace_dir` in `parent` began: back under its name where that is free, else away."""
    for aside in parent.glob(REPLACED + "*"):
        final = aside.with_name(aside.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, final)
            fsync(parent)


def require_space(path: Path, needed: int) -> None:
    """Raise UserError unless `needed` bytes are free on the filesystem of `path` (quotas are not seen)."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(f"{path}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free: make room, "
                        "or keep fewer checkpoints (checkpoint.keep_last)")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    bytes: int
    sha256: Digest


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json` of a checkpoint: what it is and every file in it."""

    step: int
    k: int
    fence: int
    world: int
    stage: int
    dtype: str
    files: Mapping[str, FileEntry]
    """Path relative to the checkpoint, with `/`, to size and hash; the manifest itself is left out."""

    @classmethod
    def collect(cls, folder: Path, hashes: Mapping[str, Digest], *, step: int, k: int, fence: int, world: int,
                stage: int, dtype: str) -> Manifest:
        """Describe the files that stand in `folder`.

        `hashes` holds what each rank computed of its own files; a file that is missing from it is hashed here. Raises
        DataCorruption for a hash whose file is not there, or anything that is no plain file.
        """
        found = _files_of(folder)
        lost = sorted(set(hashes) - set(found))
        if lost:
            raise DataCorruption(f"{folder}: {lost[0]} was written by a rank and is not there")
        files = {name: FileEntry(size, hashes.get(name) or digest_of(folder / name)) for name, size in found.items()}
        return cls(step, k, fence, world, stage, dtype, files)

    def write(self, folder: Path) -> str:
        """Write `manifest.json` into `folder` and return its SHA-256, which names this very checkpoint."""
        write_json_atomic(folder / MANIFEST, {"format": _MANIFEST_FORMAT, **asdict(self)})
        return hash_file(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`. Raises DataCorruption where it is missing, torn or of another format."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            if raw.pop("format") not in _READABLE:
                raise ValueError("its format is unknown")
            files = {name: FileEntry(entry["bytes"], entry["sha256"] if isinstance(entry["sha256"], str)
                                     else tuple(entry["sha256"])) for name, entry in raw.pop("files").items()}
            return cls(files=files, **raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataCorruption(f"{path}: cannot be read as a checkpoint manifest ({error})") from error

    def verify(self, folder: Path, level: Literal["full", "sizes"] = "full") -> list[str]:
        """Compare `folder` with this manifest; one line a difference, none if it is whole.

        A file that the manifest does not name is a difference too, because DeepSpeed loads what it finds by pattern.
        Files and pieces of large ones are hashed side by side, one a core.
        """
        found = _files_of(folder, strict=False)
        hashes = digests(folder, {name: entry.sha256 for name, entry in self.files.items()
                                  if level == "full" and found.get(name) == entry.bytes})
        problems = [f"{folder / name}: is not in the manifest" for name in sorted(set(found) - set(self.files))]
        for name, entry in self.files.items():
            if name not in found:
                problems.append(f"{folder / name}: is missing")
            elif found[name] != entry.bytes:
                problems.append(f"{folder / name}: has {found[name]} bytes, {entry.bytes} were written")
            elif name in hashes and hashes[name] != entry.sha256:
                problems.append(f"{folder / name}: does not have the bytes that were written (SHA-256 differs)")
        return problems


def _files_of(folder: Path, strict: bool = True) -> dict[str, int]:
    """Relative path and size of the plain files under `folder`, but the manifest and reader pins.

    Links and other special files are refused (`strict`) or counted with size -1, which no manifest has.
    """
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder and READERS in folders:
            folders.remove(READERS)
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if relative == MANIFEST:
                continue
            info = path.lstat()
            if strict and not stat.S_ISREG(info.st_mode):
                raise DataCorruption(f"{path}: is no plain file; a checkpoint holds nothing else")
            sizes[relative] = info.st_size if stat.S_ISREG(info.st_mode) else -1
    return sizes
