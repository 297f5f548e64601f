"""Files and streams that sources are read from: which ones, in which order, how they are decompressed."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from pretrain.errors import ConfigError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What a damaged or vanished file raises while it is read."""
COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True, slots=True)
class SetAside:
    """Something that is no document: where it is, a reason to count it under, and what was found."""

    provenance: dict[str, Any]
    reason: str
    detail: str
    items: int = 1
    """Documents that are lost with it, as far as that is known."""


READ_AHEAD = 1 << 20
"""Bytes of a file that may be read and not yet used."""
UNKNOWN_BYTES = 1 << 12
"""Bytes on the disk that stand for a document in a file of which nothing could be read."""


def lost_items(read: int, read_bytes: int, size: int, *, cut: bool) -> int:
    """Estimate of the documents lost with the rest of a file of `size` bytes that failed after `read` of them.

    Of a file that is `cut` short nobody knows how much is gone: as many as were read count as lost. Else the rest held
    as many a byte as the `read_bytes` before. A file of which nothing was read counts one for each 4 KiB.
    """
    if not read:
        return max(1, size // UNKNOWN_BYTES)
    if cut:
        return read
    used = max(1, read_bytes - min(READ_AHEAD, read_bytes // 2))
    return max(1, round(read * (size - used) / used))


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file, or a stretch of it that can be read by itself."""

    name: str
    """As provenance spells it: below the source's folder, with /."""
    path: Path
    size: int
    """Bytes on the disk."""
    start: int = 0
    """First byte of a line in a file of lines, first row group of a Parquet file."""
    stop: int | None = None
    """None: to the end."""
    before: int = 0
    """Lines or rows before `start`."""


class Meter:
    """Bytes read from disk, for progress."""

    def __init__(self) -> None:
        self.bytes = 0


def matching_files(root: Path, pattern: str, key: str) -> list[tuple[str, Path]]:
    """(path below `root`, file), sorted by the former, of the files that match; `root` may be one file itself.

    Hidden files are left out. Raises ConfigError below `key` where nothing matches.
    """
    if not root.exists():
        raise ConfigError(f"{key}.path", f"{root} does not exist")
    if root.is_file():
        return [(spelled(Path(root.name)), root)]
    try:
        found = [(p.relative_to(root), p) for p in root.glob(pattern) if p.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{key}.glob", f'"{pattern}" is no pattern below {root} ({error})') from None
    found = [(name, p) for name, p in found if not any(part.startswith(".") for part in name.parts)]
    if not found:
        raise ConfigError(f"{key}.glob", f'no file in {root} matches "{pattern}"')
    return sorted((spelled(name), p) for name, p in found)


def spelled(name: Path) -> str:
    """A path as text. File names are any bytes, provenance is JSON: what is not UTF-8 is escaped."""
    return os.fsencode(name.as_posix()).decode(errors="backslashreplace")


def format_of(path: Path) -> str:
    """Suffix of a file without that of its compression, in lower case: .jsonl of a.JSONL.gz."""
    return next((s for s in reversed([s.lower() for s in path.suffixes]) if s not in COMPRESSED), "")


def open_text(path: Path, meter: Meter | None = None) -> IO[bytes]:
    """The file's content, decompressed. A compressed file cut short, to 0 bytes too, raises EOFError where it ends."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED and path.stat().st_size == 0:
        raise EOFError("0 bytes, which is no compressed file")
    raw = _Counted(path, meter or Meter())
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, READ_AHEAD), mode="rb")  # type: ignore[return-value]
    if suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdFile(raw), READ_AHEAD)
    return io.BufferedReader(raw, READ_AHEAD)


class _Counted(io.FileIO):
    """A file that tells the meter what is read of it."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end."""
        count = super().readinto(buffer) or 0
        self._meter.bytes += count
        return count

    def readall(self) -> bytes:
        """Everything that is left."""
        content = super().readall() or b""
        self._meter.bytes += len(content)
        return content


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file as one stream. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the next decompressed bytes; 0 at the end."""
        while not self._output:
            self._input = self._input or self._read()
            if not self._input:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        taken = min(len(buffer), len(self._output))
        buffer[:taken], self._output = self._output[:taken], self._output[taken:]
        return taken

    def _read(self) -> bytes:
        buffer = bytearray(1 << 17)
        return bytes(buffer[:self._file.readinto(buffer)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
