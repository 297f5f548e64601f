"""Texts in webdataset tars. Members are read as streams of bytes; nothing is ever extracted to a path."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from data_prep.reading import READ_ERRORS, FilePart, Meter, SetAside, open_text
from data_prep.rows import Where, too_large


def tar_texts(part: FilePart, where: Where, member: str, text_field: str, limit: int,
              meter: Meter | None = None) -> Iterator[tuple[Where, bytes | SetAside]]:
    """(provenance with the sample's key, text) of each sample's `member`; of a .json member its `text_field`.

    A sample's name ends at the first dot of its file name. Members that are no plain files are set aside. A tar cut
    short gives what is whole and is named.
    """
    number = 0
    try:
        with open_text(part.path, meter) as file, tarfile.open(fileobj=(stream := _Tail(file)), mode="r|") as tar:
            for info in tar:
                if info.isdir():
                    continue
                folder, _, name = info.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if suffix.lower() != member:
                    continue
                here = where | {"key": f"{folder}/{key}".lstrip("/"), "sample": number}
                number += 1
                if not info.isfile():
                    yield here, SetAside(here, "no_file", "a link or a device, not a file")
                elif info.size > limit + (1 << 20):
                    yield here, too_large(info.size, here, limit)
                else:
                    content = tar.extractfile(info)
                    assert content is not None  # of a plain file
                    yield here, _text(content.read(), info.size, here, suffix, text_field)
            stream.require_end()
    except (*READ_ERRORS, tarfile.TarError) as error:
        here = where | {"sample": number}
        yield here, SetAside(here, "unreadable", str(error))


class _Tail(io.RawIOBase):
    """A stream that remembers how it ended. `tarfile` takes a tar cut short inside a header for a whole one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last, self._size = stream, b"", 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        content = self._stream.read(size)
        self._size += len(content)
        self._last = (self._last + content)[-tarfile.BLOCKSIZE:]
        return content

    def require_end(self) -> None:
        """Read to the end. Raises EOFError where the block of zeros that ends a tar is missing."""
        while self.read(1 << 20):
            pass
        if self._size % tarfile.BLOCKSIZE or self._last.strip(b"\0"):
            raise EOFError(f"the tar ends after {self._size} bytes without its last block")


def _text(content: bytes, size: int, where: Where, suffix: str, text_field: str) -> bytes | SetAside:
    if len(content) < size:
        return SetAside(where, "unreadable", f"{len(content)} of {size} bytes: the tar ends inside this member")
    if not suffix.lower().endswith("json"):
        return content
    try:
        record: Any = json.loads(content)
    except ValueError as error:
        return SetAside(where, "bad_json", str(error))
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return SetAside(where, "no_text", f'"{text_field}" is {type(text).__name__}, not text')
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        return SetAside(where, "not_utf8", f"lone surrogate at character {error.start}")
