"""Rows of tables that a user gives: csv, tsv and jsonl (plain, .gz, .zst), parquet, folders that `datasets` saved."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.reading import READ_ERRORS, format_of, open_text
from data_prep.tables import FIELD_BYTES
from pretrain.errors import UserError


@contextmanager
def opened(path: Path, *, newline: str | None = "") -> Iterator[io.TextIOWrapper]:
    """Decompressed UTF-8 text. Raises UserError where what is read within is damaged, or no UTF-8."""
    try:
        with open_text(path) as stream:
            yield io.TextIOWrapper(stream, "utf-8-sig", newline=newline)
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def lists(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and line, fields) of the rows of .csv and .tsv that are not empty. In .tsv a quote is a character.

    Raises UserError.
    """
    tabs = format_of(path) == ".tsv"
    csv.field_size_limit(FIELD_BYTES)
    with opened(path) as lines:
        reader = csv.reader(lines, delimiter="\t" if tabs else ",",
                            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield f"{path}:{reader.line_num}", fields
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None


def objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of .jsonl, .parquet and folders. Raises UserError."""
    if path.is_dir() or format_of(path) == ".parquet":
        from datasets import Dataset, load_from_disk
        try:
            table = load_from_disk(str(path)) if path.is_dir() else Dataset.from_parquet(str(path))
        except Exception as error:  # of pyarrow or of `datasets`, of many kinds
            told = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read ({told:.200})") from None
        for number, row in enumerate(table):
            yield f"{path}, row {number}", row
        return
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", json_object(line, f"{path}:{number}")


def json_object(line: str, where: str) -> dict[str, Any]:
    """Raises UserError for anything else."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object: {line[:100]}")
    return value
