"""Reading documents in a fixed order. What cannot be read is set aside with its reason, never fatal."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.reading import SKIPPED_FOLDERS, FilePart, Meter, SetAside, matching_files
from data_prep.rows import Where, columns_of, file_rows, hub_rows, too_large
from data_prep.source_config import (
    DocumentSource,
    HubSource,
    JsonlSource,
    MarkdownSource,
    ParquetSource,
    PythonSource,
    SourceBase,
    StdlibSource,
    TableSource,
    TarSource,
)
from data_prep.tars import tar_texts
from pretrain.errors import ConfigError

_FRONT_MATTER = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(?=[\w\"'-]+[ \t]*:).*?^(?:---|\.\.\.)[ \t]*\r?$\n?",
                           re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it was found: valid UTF-8 that is more than white space and holds no NUL."""

    text: bytes
    source: int
    provenance: dict[str, Any]
    """Source name and path below the source's folder; for lines and rows also their number."""


def source_folder(source: DocumentSource) -> Path | None:
    """The folder (or single file) a source reads, as an absolute path; None where it reads no files."""
    if isinstance(source, HubSource):
        return None
    if isinstance(source, StdlibSource):
        return Path(sysconfig.get_paths()["stdlib"]).absolute()
    if isinstance(source, PythonSource):
        return Path(source.path or sysconfig.get_paths()["purelib"]).absolute()
    return Path(source.path).absolute()


def source_files(source: DocumentSource, key: str) -> list[tuple[str, Path]]:
    """(path below the source's folder, file), sorted by the former. Raises ConfigError below `key` where none is."""
    root = source_folder(source)
    if root is None:
        return []
    pattern = "**/*.py" if isinstance(source, StdlibSource) else source.glob  # type: ignore[union-attr]
    files = matching_files(root, pattern, key)
    if isinstance(source, StdlibSource | PythonSource):
        files = [(name, path) for name, path in files
                 if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1] if root != path else ())]
    if isinstance(source, TableSource | ParquetSource):
        require_columns(files[0][1], {"text_field": source.text_field}, key, getattr(source, "columns", None))
    return files


def require_columns(path: Path, wanted: dict[str, str], key: str, header: list[str] | None = None) -> None:
    """Raise ConfigError below `key` where a file (or its given `header`) lacks columns that fields of a section name.

    """
    try:
        found = header or columns_of(path)
    except Exception:  # whatever is wrong with the file is found, and set aside, when it is read
        return
    for field, column in wanted.items():
        if found is not None and column not in found:
            raise ConfigError(f"{key}.{field}", f'{path} has no column "{column}"; it has {", ".join(found) or "none"}')


def whole_parts(files: Iterable[tuple[str, Path]]) -> list[FilePart]:
    """Each file as one part."""
    return [FilePart(name, path, path.stat().st_size) for name, path in files]


def read_source(source: DocumentSource, number: int, max_document_bytes: int) -> Iterator[Document | SetAside]:
    """Everything in one source, in order, up to its limits. Raises ConfigError where it holds no file."""
    parts: list[FilePart | None] = [*whole_parts(source_files(source, f"sources.{number}"))] or [None]
    return limited(read_parts(source, number, parts, max_document_bytes), source)


def limited(items: Iterable[Any], source: SourceBase) -> Iterator[Any]:
    """`items` up to the limits of their source, which count what has `texts` or a `text`."""
    documents = total = 0
    for item in items:
        size = _size(item)
        if size is not None:
            documents += 1
            total += size
            if source.max_bytes is not None and total > source.max_bytes:
                return
        yield item
        if documents == source.max_documents:
            return


def _size(item: Any) -> int | None:
    if isinstance(item, Document):
        return len(item.text)
    texts = getattr(item, "texts", None)
    return None if texts is None else sum(map(len, texts))


def read_parts(source: DocumentSource, number: int, parts: Iterable[FilePart | None], limit: int,
               meter: Meter | None = None) -> Iterator[Document | SetAside]:
    """Documents of parts of a source; the part of a source without files is None, or holds rows [start, stop)."""
    for part in parts:
        where = {"source": source.name}
        if isinstance(source, HubSource):
            start, stop = (0, None) if part is None else (part.start, part.stop)
            rows = hub_rows(source.dataset, where, start, stop, f"sources.{number}")
            yield from (_record(row, here, number, source.text_field, limit) for here, row in rows)
            continue
        assert part is not None
        where["path"] = part.name
        if isinstance(source, JsonlSource | TableSource | ParquetSource):
            chosen = [source.text_field] if isinstance(source, ParquetSource) else None
            header = source.columns if isinstance(source, TableSource) else None
            for here, row in file_rows(part, where, limit, chosen=chosen, header=header, meter=meter):
                yield _record(row, here, number, source.text_field, limit)
        elif isinstance(source, TarSource):
            for here, text in tar_texts(part, where, source.member, source.text_field, limit, meter):
                yield text if isinstance(text, SetAside) else _check(text, here, number, limit)
        else:
            yield _file(part, where, number, limit, isinstance(source, MarkdownSource))
            if meter is not None:
                meter.bytes += part.size


def _file(part: FilePart, where: Where, number: int, limit: int, markdown: bool) -> Document | SetAside:
    try:
        size = part.path.stat().st_size
        if size > limit:
            return too_large(size, where, limit)
        text = part.path.read_bytes()
    except OSError as error:
        return SetAside(where, "unreadable", str(error.strerror))
    return _check(_COMMENT.sub(b"", _FRONT_MATTER.sub(b"", text)) if markdown else text, where, number, limit)


def _check(text: bytes, where: Where, number: int, limit: int) -> Document | SetAside:
    if len(text) > limit:
        return too_large(len(text), where, limit)
    if not text.strip():
        return SetAside(where, "empty", f"{len(text)} bytes")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return SetAside(where, "not_utf8", f"byte {text[error.start]:#04x} at offset {error.start}")
    if b"\0" in text:
        return SetAside(where, "nul_bytes", f"{text.count(0)} of {len(text)}, the first at offset {text.index(0)}")
    return Document(text, number, where)


def _record(row: dict[str, Any] | SetAside, where: Where, number: int, text_field: str,
            limit: int) -> Document | SetAside:
    if isinstance(row, SetAside):
        return row
    text = row.get(text_field)
    if not isinstance(text, str):
        return SetAside(where, "no_text", f'"{text_field}" is {type(text).__name__}, not text')
    try:
        return _check(text.encode(), where, number, limit)
    except UnicodeEncodeError as error:
        return SetAside(where, "not_utf8", f"lone surrogate at character {error.start}")
