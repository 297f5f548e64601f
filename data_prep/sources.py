"""Reading documents in a fixed order. What cannot be read is set aside with its reason, never fatal."""

from __future__ import annotations

import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.config import FolderSource, JsonlSource, StdlibSource
from pretrain.errors import ConfigError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
SourceConfig = StdlibSource | FolderSource | JsonlSource


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it was found: valid UTF-8 that is more than white space."""

    text: bytes
    source: int
    provenance: dict[str, Any]
    """Source name and path below the source's folder; for lines also line number (from 1) and decompressed offset."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Something that is no document: where it is, a reason to count it under, and what was found."""

    provenance: dict[str, Any]
    reason: str
    detail: str


def source_folder(source: SourceConfig) -> Path:
    """The folder (or single file) a source reads, as an absolute path."""
    return Path(sysconfig.get_paths()["stdlib"] if isinstance(source, StdlibSource) else source.path).absolute()


def source_files(source: SourceConfig, key: str) -> list[tuple[str, Path]]:
    """(path below the source's folder, file), sorted by the former. Raises ConfigError below `key` where none is."""
    root = source_folder(source)
    if not root.exists():
        raise ConfigError(f"{key}.path", f"{root} does not exist")
    if not isinstance(source, StdlibSource):
        return matching_files(root, source.glob, key)
    files = matching_files(root, "**/*.py", key)
    return [(name, path) for name, path in files if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]


def matching_files(root: Path, pattern: str, key: str) -> list[tuple[str, Path]]:
    """(path below `root`, file), sorted by the former, of the files that match; `root` may be one file itself.

    Hidden files are left out. Raises ConfigError below `key` where nothing matches.
    """
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


def read_source(source: SourceConfig, number: int, max_document_bytes: int) -> Iterator[Document | SetAside]:
    """Everything in one source, in order, up to its limits. Raises ConfigError where it holds no file."""
    documents = total = 0
    for item in _items(source, number, max_document_bytes):
        if isinstance(item, Document):
            documents += 1
            total += len(item.text)
            if source.max_bytes is not None and total > source.max_bytes:
                return
        yield item
        if documents == source.max_documents:
            return


def _items(source: SourceConfig, number: int, limit: int) -> Iterator[Document | SetAside]:
    for name, path in source_files(source, f"sources.{number}"):
        where = {"source": source.name, "path": name}
        if isinstance(source, JsonlSource):
            yield from _jsonl(path, where, number, source.text_field, limit)
        else:
            yield _file(path, where, number, limit)


def _file(path: Path, where: dict[str, Any], number: int, limit: int) -> Document | SetAside:
    try:
        size = path.stat().st_size
        return _check(path.read_bytes(), where, number, limit) if size <= limit else _too_large(size, where, limit)
    except OSError as error:
        return SetAside(where, "unreadable", str(error.strerror))


def _too_large(size: int, where: dict[str, Any], limit: int) -> SetAside:
    return SetAside(where, "too_large", f"{size} bytes, max_document_bytes is {limit}")


def _check(text: bytes, where: dict[str, Any], number: int, limit: int) -> Document | SetAside:
    if len(text) > limit:
        return _too_large(len(text), where, limit)
    if not text.strip():
        return SetAside(where, "empty", f"{len(text)} bytes")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return SetAside(where, "not_utf8", f"byte {text[error.start]:#04x} at offset {error.start}")
    return Document(text, number, where)


def _jsonl(path: Path, where: dict[str, Any], number: int, text_field: str,
           limit: int) -> Iterator[Document | SetAside]:
    line, offset = 0, 0
    longest = 8 * limit + (1 << 20)  # the text with escapes (at most 6 bytes for one) and the other keys
    try:
        with open_text(path) as stream:
            while content := stream.readline(longest):
                line += 1
                here = where | {"line": line, "offset": offset}
                offset += len(content)
                if len(content) == longest and not content.endswith(b"\n"):
                    while content and not content.endswith(b"\n"):
                        content = stream.readline(longest)
                        offset += len(content)
                    yield _too_large(offset - here["offset"], here, limit)
                elif content.strip():
                    yield _record(content, here, number, text_field, limit)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        yield SetAside(where | {"line": line + 1, "offset": offset}, "unreadable", str(error))


def _record(content: bytes, where: dict[str, Any], number: int, text_field: str, limit: int) -> Document | SetAside:
    try:
        record = json.loads(content)
    except UnicodeDecodeError as error:
        return SetAside(where, "not_utf8", f"byte {content[error.start]:#04x} at offset {error.start} of the line")
    except ValueError as error:
        return SetAside(where, "bad_json", str(error))
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return SetAside(where, "no_text", f'"{text_field}" is {type(text).__name__}, not text')
    try:
        return _check(text.encode(), where, number, limit)
    except UnicodeEncodeError as error:
        return SetAside(where, "not_utf8", f"lone surrogate at character {error.start}")


def open_text(path: Path) -> IO[bytes]:
    """The file's content, decompressed. A compressed file cut short raises EOFError where it ends."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return path.open("rb", buffering=1 << 20)


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file as one stream. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the next decompressed bytes; 0 at the end."""
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
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

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
