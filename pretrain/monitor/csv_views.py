"""`metrics.csv` and `metrics_long.csv`: views of the rows of the record that count."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pretrain.monitor.rows import REWIND, Row, Value, read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_text_atomic

log = logging.getLogger(__name__)


class CsvView:
    """One table, made from the record at each start and after each return to a checkpoint, appended to otherwise."""

    def __init__(self, folder: RunFolder, path: Path) -> None:
        self._folder = folder
        self._path = path
        self._file: io.TextIOWrapper | None = self._rebuild()
        """None where a row could not be written: the table is made anew with the next one."""

    def write(self, row: Mapping[str, Value]) -> None:
        """Append `row`, which the record has already."""
        try:
            if self._file is None or row.get(REWIND) is not None or not self.fits(row):
                self.close()
                self._file = self._rebuild()
            else:
                self._file.write(self.lines(row))
                self._file.flush()
        except OSError as error:
            log.warning("%s: a row was not written (%s)", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of a row that it could not write before
                file.close()

    def _rebuild(self) -> io.TextIOWrapper:
        rows = read_metrics(self._folder)
        head = self.header(rows)
        write_text_atomic(self._path, head + "".join(map(self.lines, rows)))
        return open(self._path, "a", encoding="utf-8", newline="")

    def header(self, rows: Sequence[Row]) -> str:
        """The first line of a table of `rows`."""
        raise NotImplementedError

    def fits(self, row: Mapping[str, Value]) -> bool:
        """Whether `row` goes under the header as it is."""
        raise NotImplementedError

    def lines(self, row: Mapping[str, Value]) -> str:
        """The lines of one row."""
        raise NotImplementedError


class WideView(CsvView):
    """`metrics.csv`: a row a line, a column a metric.

    The declared columns lead, the others follow in the order in which they first appeared. A row with a new column
    rewrites the table with that column at the end, so that rows and header always agree; old rows have an empty cell.
    """

    def __init__(self, folder: RunFolder, leading: Sequence[str]) -> None:
        """`leading`: names of the first columns; `name=key` shows the metric `key` under another name."""
        self._columns = column_names(leading)
        super().__init__(folder, folder.metrics_csv)

    def header(self, rows: Sequence[Row]) -> str:
        """Names of all columns, those of `rows` included."""
        for row in rows:
            self._columns |= {key: key for key in row if key not in self._columns and key != "fence"}
        return cells(self._columns.values()) if self._columns else ""

    def fits(self, row: Mapping[str, Value]) -> bool:
        """Whether every metric of `row` has its column."""
        return self._columns.keys() >= row.keys()

    def lines(self, row: Mapping[str, Value]) -> str:
        """One line."""
        return cells(row.get(column) for column in self._columns)


class LongView(CsvView):
    """`metrics_long.csv`: step, name, value; one metric a line, so that a name can be looked for in the whole file."""

    def __init__(self, folder: RunFolder, leading: Sequence[str]) -> None:
        """`leading`: as of `WideView`, for the names."""
        self._names = column_names(leading)
        super().__init__(folder, folder.metrics_long_csv)

    def header(self, rows: Sequence[Row]) -> str:
        """The three names."""
        return cells(("step", "name", "value"))

    def fits(self, row: Mapping[str, Value]) -> bool:
        """Always."""
        return True

    def lines(self, row: Mapping[str, Value]) -> str:
        """A line for each metric that has a value."""
        return "".join(cells((row.get("step"), self._names.get(key, key), value)) for key, value in row.items()
                       if value is not None and key not in ("step", "fence"))


def column_names(leading: Sequence[str]) -> dict[str, str]:
    """Name by key of columns written as `key` or `name=key`, in their order."""
    parts = [column.partition("=") for column in leading]
    return {key or name: name for name, _, key in parts}


def cells(values: Iterable[Value]) -> str:
    """One line of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if value is None else value for value in values])
    return text.getvalue()
