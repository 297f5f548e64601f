"""Rows of `metrics.jsonl`: how one is written, and which of them count.

The file is the record of a run. Every row carries the fence number of its writer; after a restart the rows of steps
that a later holder went through again are superseded, and so is whatever a stale process still appends. A run that goes
back to a checkpoint by itself says so in a row, which supersedes the later steps above it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from pretrain.runfolder.chain import read_chain
from pretrain.runfolder.layout import RunFolder

log = logging.getLogger(__name__)
Value = float | int | str | None
Row = dict[str, Value]
REWIND = "rewind"
"""Key of the row of a return to an earlier step: rows above it of later steps no longer count."""
_NOTE = "_nonfinite"
_TAIL = 1 << 16


def encode(row: Mapping[str, Value], fence: int) -> bytes:
    """One line of JSON. JSON has no NaN: such a value becomes null beside a note `KEY_nonfinite`."""
    out: Row = {"fence": fence}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            out[key], out[key + _NOTE] = None, str(value)
        else:
            out[key] = value
    return (json.dumps(out, allow_nan=False) + "\n").encode()


def decode(line: bytes) -> Row | None:
    """The row that `encode` wrote, with `fence`; None for a torn line."""
    try:
        raw: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("fence"), int):
        return None
    notes = {key.removesuffix(_NOTE): value for key, value in raw.items() if key.endswith(_NOTE)}
    return {key: float(notes[key]) if key in notes else value for key, value in raw.items() if not key.endswith(_NOTE)}


def read_metrics(folder: RunFolder) -> list[Row]:
    """All rows that count, oldest first: those on the chain of holders, up to the step at which the next took over."""
    try:
        lines = folder.metrics_jsonl.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return _counting(folder, [decode(line) for line in lines if line])


def last_row(folder: RunFolder, key: str) -> Row | None:
    """The newest row that counts and has a value for `key`, looked for near the end of the file; None if none is."""
    with contextlib.suppress(FileNotFoundError), open(folder.metrics_jsonl, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().splitlines()[1 if size > _TAIL else 0:]
        rows = _counting(folder, [decode(line) for line in lines if line])
        return next((row for row in reversed(rows) if row.get(key) is not None), None)
    return None


def _counting(folder: RunFolder, rows: list[Row | None]) -> list[Row]:
    whole = [row for row in rows if row is not None]
    if len(whole) < len(rows):
        log.warning("%s: %d torn lines passed over", folder.metrics_jsonl, len(rows) - len(whole))
    chain = read_chain(folder.lease_dir, {_integer(row, "fence") for row in whole})
    kept: list[Row] = []
    for row in whole:
        if chain.counts(_integer(row, "fence"), _integer(row, "step")):
            if row.get(REWIND) is not None:
                kept = [before for before in kept if _integer(before, "step") <= _integer(row, "step")]
            kept.append(row)
    return kept


def _integer(row: Row, key: str) -> int:
    value = row.get(key)
    return int(value) if isinstance(value, (int, float)) else 0
