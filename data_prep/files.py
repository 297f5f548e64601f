"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. What hashes are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written before it is published."""
    return path.with_name(f".tmp-{path.name}")


def publish(file: IO[bytes], path: Path) -> None:
    """Flush `file`, which is open under the temporary name of `path`, to the disk, close it and give it its name.

    The name itself survives a power cut once the folder is flushed too, which the caller does once for many files.
    """
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary_name(path), path)


def write_atomic(path: Path, content: bytes) -> str:
    """Write `content` to `path` through a temporary name and return its SHA-256 in hex."""
    with temporary_name(path).open("wb") as file:
        file.write(content)
        publish(file, path)
    return hashlib.sha256(content).hexdigest()


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with a file that should have `size` bytes, or None."""
    try:
        actual = path.stat().st_size
    except OSError as error:
        return f"{path}: missing or unreadable ({error.strerror})"
    return None if actual == size else f"{path}: {actual} bytes, {size} expected (truncated or replaced)"
