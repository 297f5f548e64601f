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


def publish(file: IO[bytes], temporary: Path, path: Path) -> None:
    """Flush `file`, which was written as `temporary`, to the disk, close it and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)


def write_atomic(path: Path, content: bytes) -> str:
    """Write `content` to `path` through a temporary name and return its SHA-256 in hex."""
    temporary = temporary_name(path)
    publish_to = temporary.open("wb")
    publish_to.write(content)
    publish(publish_to, temporary, path)
    return hashlib.sha256(content).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in large pieces without the interpreter lock."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
