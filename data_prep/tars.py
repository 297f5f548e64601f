"""Texts in webdataset tars. Members are read as streams of bytes; nothing is ever extracted to a path."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Self

from data_prep.reading import READ_ERRORS, FilePart, Meter, SetAside, lost_items, open_text
from data_prep.rows import Where, too_large

_BROKEN: tuple[type[Exception], ...] = (
    tarfile.InvalidHeaderError, tarfile.SubsequentHeaderError)  # type: ignore[attr-defined]
_ZEROS: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_END_BYTES = tarfile.RECORDSIZE + tarfile.BLOCKSIZE
"""Zeros that end a tar: two blocks, filled up to a record. More of them before another member are a hole."""


def tar_texts(part: FilePart, where: Where, member: str, text_field: str, limit: int,
              meter: Meter | None = None) -> Iterator[tuple[Where, bytes | SetAside]]:
    """(provenance with the sample's key, text) of each sample's `member`; of a .json member its `text_field`.

    A sample's name ends at the first dot of its file name; neighbours of one name are one sample. Samples without the
    member and members that are no plain files are set aside. Where a header is broken, reading goes on at the next
    whole one. Tars put one after the other in a file are all read. A tar cut short gives what is whole and is named.
    """
    number, meter = 0, meter or Meter()
    before = meter.bytes
    try:
        with (open_text(part.path, meter) as file,
              _Tar.open(fileobj=(stream := _Tail(file)), mode="r|", ignore_zeros=True) as tar):
            sample = _Sample(where, member)
            for info in tar:
                if tar.lost(info.offset):
                    yield _gap(tar, where, number, info.offset)
                if info.isdir():
                    continue
                if lacking := sample.take(info.name, number):
                    yield lacking
                if not sample.wanted:
                    continue
                here = where | {"key": sample.key, "sample": number}
                number += 1
                if not info.isfile():
                    yield here, SetAside(here, "no_file", "a link or a device, not a file")
                elif info.size > limit + (1 << 20):
                    yield here, too_large(info.size, here, limit)
                else:
                    content = tar.extractfile(info)
                    assert content is not None  # of a plain file
                    yield here, _text(content.read(), info.size, here, sample.suffix, text_field)
            if lacking := sample.take(None, number):
                yield lacking
            if tar.broken:
                yield _gap(tar, where, number, stream.read_on())
            else:
                stream.require_end()
    except (*READ_ERRORS, tarfile.TarError) as error:
        here = where | {"sample": number}
        cut = isinstance(error, EOFError | tarfile.ReadError)
        lost = lost_items(number, meter.bytes - before, part.size, cut=cut)
        yield here, SetAside(here, "unreadable", str(error), lost)


class _Sample:
    """The sample that members belong to, while they are read."""

    def __init__(self, where: Where, member: str) -> None:
        self._where, self._member = where, member
        self._found = True
        self.key: str | None = None
        self.suffix = ""

    @property
    def wanted(self) -> bool:
        """Whether the last member is the one that is asked for."""
        return self.suffix.lower() == self._member

    def take(self, path: str | None, number: int) -> tuple[Where, SetAside] | None:
        """Go on to a member (None: the end). Returns the sample before it where that ended without its member."""
        folder, _, name = (path or "").rpartition("/")
        stem, _, self.suffix = name.partition(".")
        key = None if path is None else f"{folder}/{stem}".lstrip("/")
        lacking = None
        if key != self.key:
            if not self._found:
                here = self._where | {"key": self.key, "sample": number}
                lacking = here, SetAside(here, "no_member", f'no member "{self._member}"')
            self.key, self._found = key, path is None
        self._found = self._found or self.wanted
        return lacking


class _Member(tarfile.TarInfo):
    """A header. One that is broken is noted: `tarfile` ends there without a word, or passes over it."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:  # the library's name for it
        """The next header of the open tar."""
        start = tarfile.fileobj.tell()
        try:
            return super().fromtarfile(tarfile)
        except _ZEROS:
            tarfile.zeros = start if tarfile.zeros is None else tarfile.zeros
            raise
        except _BROKEN:
            tarfile.broken.append(start)
            raise


class _Tar(tarfile.TarFile):
    """A tar that knows where `broken` headers, and the first block of `zeros`, stood since the last whole one."""

    tarinfo = _Member

    def __init__(self, *args: Any, **options: Any) -> None:
        self.broken: list[int] = []
        self.zeros: int | None = None
        super().__init__(*args, **options)

    def lost(self, stop: int) -> bool:
        """Whether what lies before the header at byte `stop` is damage; else it is forgotten."""
        if self.broken or (self.zeros is not None and stop - self.zeros > _END_BYTES):
            return True
        self.zeros = None
        return False

    def next(self) -> tarfile.TarInfo | None:
        """The next member with a whole header; None at the end."""
        while True:
            noted = len(self.broken)
            try:
                return super().next()
            except tarfile.ReadError:
                if len(self.broken) == noted:
                    raise
                # An extended header without the one it belongs to: both are consumed, go on behind them.
                self.offset = self.fileobj.tell()


def _gap(tar: _Tar, where: Where, number: int, stop: int) -> tuple[Where, SetAside]:
    """What is lost between the first block that is no header and byte `stop`, by the size of the samples before it."""
    start = min(tar.broken if tar.zeros is None else [*tar.broken, tar.zeros])
    tar.broken.clear()
    tar.zeros = None
    here = where | {"sample": number, "offset": start}
    lost = max(1, round(number * (stop - start) / start)) if start else 1
    return here, SetAside(here, "unreadable", f"no tar header at byte {start}; {stop - start} bytes are passed over",
                          lost)


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

    def read_on(self) -> int:
        """Read to the end. Returns the bytes of the whole stream."""
        while self.read(1 << 20):
            pass
        return self._size

    def require_end(self) -> None:
        """Read to the end. Raises EOFError where the block of zeros that ends a tar is missing."""
        self.read_on()
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
