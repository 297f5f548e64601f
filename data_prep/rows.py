"""Rows of files and datasets as dictionaries: JSON lines, csv, tsv, Parquet, the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.reading import COMPRESSED, READ_ERRORS, FilePart, Meter, SetAside, format_of, lost_items, open_text
from data_prep.source_config import HubDataset
from data_prep.tables import TABLES, read_table, table_rows
from pretrain.errors import ConfigError, DataCorruption

BATCH_ROWS = 256
"""Rows of a Parquet file or a dataset that are held at once."""
FORMATS = (".jsonl", ".json", ".ndjson", *TABLES, ".parquet")
Where = dict[str, Any]
Row = dict[str, Any]


def file_rows(part: FilePart, where: Where, limit: int, *, chosen: list[str] | None = None,
              header: list[str] | None = None, meter: Meter | None = None) -> Iterator[tuple[Where, Row | SetAside]]:
    """(provenance, fields by name) of each row of a file by its suffix; what cannot be read is set aside.

    A JSON list has its positions as names ("0", "1"). Of a Parquet file only the columns `chosen` are read. `header`
    names the columns of csv and tsv files that have none. `limit` is the longest text in bytes that the caller takes;
    lines much longer are set aside without being held in memory.
    """
    suffix = format_of(part.path)
    if part.size == 0 and suffix != ".parquet" and part.path.suffix.lower() not in COMPRESSED:
        yield where, SetAside(where, "empty", "a file of 0 bytes")
    elif suffix in TABLES:
        yield from table_rows(part, where, limit, header, meter)
    elif suffix == ".parquet":
        yield from _parquet_rows(part, where, chosen, meter)
    else:
        yield from _json_rows(part, where, limit, meter)


def columns_of(path: Path) -> list[str] | None:
    """Names of the columns of a file; None where it has none. Raises what its reader raises."""
    suffix = format_of(path)
    if suffix in TABLES and path.stat().st_size:
        with open_text(path) as stream:
            return next((row.fields or [] for row in read_table(stream, suffix, 1 << 20)), [])
    if suffix == ".parquet":
        import pyarrow.parquet
        return list(pyarrow.parquet.read_schema(path).names)
    return None


def _json_rows(part: FilePart, where: Where, limit: int,
               meter: Meter | None) -> Iterator[tuple[Where, Row | SetAside]]:
    line, offset, meter = part.before, part.start, meter or Meter()
    before = meter.bytes
    longest = 8 * limit + (1 << 20)  # the text with escapes (at most 6 bytes for one) and the other keys
    try:
        with open_text(part.path, meter) as stream:
            if part.start:
                stream.seek(part.start)
            while (part.stop is None or offset < part.stop) and (content := stream.readline(longest)):
                line += 1
                here = where | {"line": line, "offset": offset}
                offset += len(content)
                if len(content) == longest and not content.endswith(b"\n"):
                    while content and not content.endswith(b"\n"):
                        content = stream.readline(longest)
                        offset += len(content)
                    yield here, too_large(offset - here["offset"], here, limit)
                elif content.strip():
                    yield here, json_row(content, here)
    except READ_ERRORS as error:
        here = where | {"line": line + 1, "offset": offset}
        lost = lost_items(line - part.before, meter.bytes - before, part.size, cut=isinstance(error, EOFError))
        yield here, SetAside(here, "unreadable", str(error), lost)


def too_large(size: int, where: Where, limit: int) -> SetAside:
    """A document that is longer than the limit."""
    return SetAside(where, "too_large", f"{size} bytes, max_document_bytes is {limit}")


def json_row(content: bytes, where: Where) -> Row | SetAside:
    """Fields of one JSON line."""
    try:
        record = json.loads(content)
    except UnicodeDecodeError as error:
        return SetAside(where, "not_utf8", f"byte {content[error.start]:#04x} at offset {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return SetAside(where, "bad_json", str(error))
    if isinstance(record, list):
        return {str(i): value for i, value in enumerate(record)}
    return record if isinstance(record, dict) else SetAside(where, "bad_json", "neither an object nor a list")


def _parquet_rows(part: FilePart, where: Where, columns: list[str] | None,
                  meter: Meter | None) -> Iterator[tuple[Where, Row | SetAside]]:
    import pyarrow
    import pyarrow.parquet
    number = part.before
    try:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            stop = file.num_row_groups if part.stop is None else part.stop
            sizes = [file.metadata.row_group(group).num_rows for group in range(part.start, stop)]
            missing = next((c for c in columns or [] if c not in file.schema_arrow.names), None)
            if missing is not None:
                here = where | {"row": number}
                yield here, SetAside(here, "no_column", f'no column "{missing}" in {sum(sizes)} rows; it has '
                                     f'{", ".join(file.schema_arrow.names)}', sum(sizes))
                sizes = []
            for group, rows in enumerate(sizes, part.start):
                yield from _group_rows(file, group, rows, number, where, columns)
                number += rows
    except (*READ_ERRORS, pyarrow.ArrowException) as error:  # no footer: nothing is read
        here = where | {"row": number}
        yield here, SetAside(here, "unreadable", str(error), lost_items(0, 0, part.size, cut=True))
    if meter is not None:
        meter.bytes += part.size


def _group_rows(file: Any, group: int, rows: int, number: int, where: Where,
                columns: list[str] | None) -> Iterator[tuple[Where, Row | SetAside]]:
    """Rows of a row group, the first of them `number`; from a damaged page on, the rest of the group is lost."""
    import pyarrow
    stop = number + rows
    try:
        for batch in file.iter_batches(BATCH_ROWS, [group], columns):
            for row in batch.to_pylist():
                yield where | {"row": number}, row
                number += 1
    except (*READ_ERRORS, pyarrow.ArrowException) as error:
        here = where | {"row": number}
        yield here, SetAside(here, "unreadable", str(error), max(1, stop - number))


def open_hub(dataset: HubDataset, key: str) -> Any:
    """The dataset, an iterable one where it streams. Raises ConfigError below `key` where there is none."""
    import datasets
    try:
        root = Path(dataset.path)
        if root.is_dir() and ((root / "dataset_dict.json").is_file() or (root / "state.json").is_file()):
            found = datasets.load_from_disk(str(root))
            return found[dataset.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(dataset.path, dataset.subset, split=dataset.split, revision=dataset.revision,
                                     data_files=dataset.data_files or None, streaming=dataset.streaming)
    except Exception as error:  # the library raises many kinds for what is wrong with a name or a file
        line = str(error).strip().split("\n")[0]
        raise ConfigError(f"{key}.dataset", f"{dataset.path}: cannot be opened ({type(error).__name__}: {line})"
                          ) from None


def hub_rows(dataset: HubDataset, where: Where, start: int, stop: int | None,
             key: str) -> Iterator[tuple[Where, Row | SetAside]]:
    """Rows [start, stop) of a dataset of the library, numbered from 0.

    Raises DataCorruption where a stream ends in an error: its rest, of unknown size, is not lost in silence.
    """
    opened = open_hub(dataset, key)
    number = start
    if stop is None and not dataset.streaming:
        stop = len(opened)
    try:
        if stop is not None:
            opened = opened.select(range(start, stop))
        for row in opened:
            yield where | {"row": number}, row
            number += 1
    except Exception as error:  # whatever the library's readers and decoders raise
        found = f"{type(error).__name__}: {error}"
        if stop is None:
            raise DataCorruption(
                f"source {where['source']}: the stream {dataset.path} ends in an error at row {number:,}, and how much "
                f"is lost is not known ({found}); the same command tries again and goes on where it was, max_documents "
                "leaves out the rest") from error
        here = where | {"row": number}
        yield here, SetAside(here, "unreadable", found, max(1, stop - number))
