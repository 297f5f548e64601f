"""Rows of csv and tsv files. A quote that nothing closes costs its line, not the rest of the file.

A quoted field may hold line ends. Where a row that goes over several lines does not come out (the file ends before the
closing quote, something else than a separator follows it, or the row grows beyond any that is wanted) its first line is
set aside as `open_quote` and the next line is read as a row of its own. A row of one line is read as leniently as the
`csv` module does. In tsv files, which are mostly written without quoting, the same rule tells quoting from a quote that
is text: the line is then read as it stands, and so it is where a row of several lines has not the header's columns.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_prep.reading import READ_ERRORS, FilePart, Meter, SetAside, format_of, lost_items, open_text

FIELD_BYTES = 1 << 28
"""Longest field of a csv file. The library's own limit of 131,072 characters is less than a long page."""
TABLES = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row as it stands in the file."""

    line: int
    """The first of its lines, from 1."""
    lines: int
    fields: list[str] | None
    """None: its quotes do not come out."""
    error: str = ""


class _Lines:
    """Lines for the `csv` module, which also holds those of the row it is at."""

    def __init__(self, lines: Iterator[str], most: int) -> None:
        self._lines, self._most = lines, most
        self._again: deque[str] = deque()
        self._size = 0
        self.held: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._size > self._most:
            raise csv.Error(f"a quoted field goes on for more than {self._size} characters")
        line = self._again.popleft() if self._again else next(self._lines)
        self.held.append(line)
        self._size += len(line)
        return line

    def begin(self) -> None:
        """Begin a row."""
        self.held, self._size = [], 0

    def give_back(self) -> None:
        """All lines of the row but its first are to be read again."""
        self._again.extendleft(reversed(self.held[1:]))
        del self.held[1:]


def read_table(stream: IO[bytes], suffix: str, most: int) -> Iterator[TableRow]:
    """Rows of a file with `suffix` .csv or .tsv, the header as well; `most` is the longest row in characters.

    Raises what `stream` raises.
    """
    csv.field_size_limit(FIELD_BYTES)
    # Bytes that are no UTF-8 become lone surrogates, which are found later: one bad row costs one row.
    lines = _Lines(io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=""), most)
    tabs, line, columns = suffix == ".tsv", 1, 0
    reader = csv.reader(lines, strict=True, delimiter="\t" if tabs else ",")
    while True:
        lines.begin()
        fields, problem = None, ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
        if fields is None or (tabs and len(lines.held) > 1 and len(fields) != columns):
            alone = len(lines.held) == 1
            lines.give_back()
            fields = _as_it_stands(lines.held[0]) if tabs else _leniently(lines.held[0]) if alone else None
        columns = columns or len(fields or ())
        yield TableRow(line, len(lines.held), fields, problem)
        line += len(lines.held)


def _as_it_stands(line: str) -> list[str]:
    return next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))


def _leniently(line: str) -> list[str] | None:
    """Fields of one line; None where it leaves a quote open."""
    try:
        rows = list(csv.reader([line, "\n"]))  # the empty line becomes part of an open field, or a row
    except csv.Error:
        return None
    return rows[0] if len(rows) == 2 else None


def table_rows(part: FilePart, where: dict[str, Any], limit: int, header: list[str] | None,
               meter: Meter | None) -> Iterator[tuple[dict[str, Any], dict[str, Any] | SetAside]]:
    """(provenance, fields by name) of each row; the first row names the columns unless `header` does."""
    line, count, names, meter = 1, 0, header, meter or Meter()
    before = meter.bytes
    try:
        with open_text(part.path, meter) as stream:
            for row in read_table(stream, format_of(part.path), longest_row(limit)):
                here, line = where | {"line": row.line}, row.line + row.lines
                if row.fields is None:
                    yield here, SetAside(here, "open_quote", row.error)
                elif names is None:
                    names = row.fields
                elif row.fields:
                    count += 1
                    yield here, _named(row, names, here)
    except (*READ_ERRORS, csv.Error) as error:
        here = where | {"line": line}
        lost = lost_items(count, meter.bytes - before, part.size, cut=isinstance(error, EOFError))
        yield here, SetAside(here, "unreadable", str(error), lost)


def longest_row(limit: int) -> int:
    """Characters of a row whose texts have at most `limit` bytes: each may be a doubled quote, other columns 1 MB."""
    return 2 * limit + (1 << 20)


def _named(row: TableRow, names: list[str], where: dict[str, Any]) -> dict[str, Any] | SetAside:
    fields = row.fields or []
    if len(fields) != len(names):
        return SetAside(where, "bad_row", f"{len(fields)} fields, the header has {len(names)}", row.lines)
    return dict(zip(names, fields, strict=True))
