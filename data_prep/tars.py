"""Texts in webdataset tars. Members are read as streams of bytes; nothing is ever extracted to a path."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

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
        with open_text(part.path, meter) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for info in tar:
                if info.isdir():
                    continue
                folder, _, file = info.name.rpartition("/")
                key, _, suffix = file.partition(".")
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
    except (*READ_ERRORS, tarfile.TarError) as error:
        here = where | {"sample": number}
        yield here, SetAside(here, "unreadable", str(error))


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
