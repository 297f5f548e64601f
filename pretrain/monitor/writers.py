"""Where metrics go: `metrics.jsonl` (the record), tables (views of it), TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.monitor.csv_views import CsvView, LongView, WideView
from pretrain.monitor.rows import REWIND, Row, Value, encode, read_metrics
from pretrain.monitor.wandb_run import WandbOptions, WandbRun
from pretrain.runfolder.holder import Holder
from pretrain.runfolder.layout import RunFolder

__all__ = ["MetricsWriter", "Row", "Value", "WandbOptions", "read_metrics"]
log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes rows of metrics to every place at once. One writer a run: rank 0, once its lease says where it goes on."""

    def __init__(self, folder: RunFolder, csv_columns: Sequence[str], tensorboard: bool, wandb: WandbOptions | None,
                 fence: int) -> None:
        """Open the files to go on with them. Raises UserError where that fails.

        `csv_columns` lead the table (see `WideView`); where there are any, the long table is written too.
        """
        self._fence = fence
        try:
            self._jsonl = _JsonLines(folder.metrics_jsonl)
            self._tables: list[CsvView] = [WideView(folder, csv_columns)]
            if csv_columns:
                self._tables.append(LongView(folder, csv_columns))
            self._tensorboard = _TensorBoard(folder, fence) if tensorboard else None
        except OSError as error:
            raise UserError(f"{folder.root}: metrics cannot be written ({error.strerror}: {error.filename})") from error
        self._wandb = WandbRun(folder.root, wandb) if wandb is not None else None

    def write(self, row: Mapping[str, Value]) -> None:
        """Write one row; it has a `step`. It survives the death of the process from here on, though not of the machine.

        A full disk costs rows and a warning, not the run. A row with `rewind` takes the run back to its step: what was
        written of later ones no longer counts.
        """
        self._jsonl.write(encode(row, self._fence))
        for table in self._tables:
            table.write(row)
        if self._tensorboard is not None:
            self._tensorboard.write(row)
        if self._wandb is not None:
            self._wandb.log(row)

    def sync(self) -> None:
        """Flush the record to the disk, so that it reaches as far as a checkpoint that is about to be published."""
        self._jsonl.sync()

    def close(self) -> None:
        """Flush and close."""
        self._jsonl.close()
        for table in self._tables:
            table.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


class _JsonLines:
    """Appends whole lines, each in one system call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def write(self, line: bytes) -> None:
        """Append `line`; what a killed writer left of one is ended first, so that it harms no other."""
        data = b"\n" + line if self._torn else line
        try:
            self._torn = os.write(self._file, data) < len(data)
        except OSError as error:
            log.warning("%s: a row was not written (%s)", self._path, error.strerror)

    def sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            log.warning("%s: rows may not be on the disk (%s)", self._path, error.strerror)

    def close(self) -> None:
        os.close(self._file)


class _TensorBoard:
    """TensorBoard scalars by step, written by TensorBoard's own thread."""

    def __init__(self, folder: RunFolder, fence: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self._event, self._summary = event_pb2, summary_pb2
        self._failed = False
        self._writer: Any = EventFileWriter(str(folder.tensorboard_dir), max_queue_size=1000, flush_secs=10)
        holder = Holder.read(folder.lease_dir / str(fence))
        if holder is not None and holder.resumed_from is not None:
            self._hide_from(holder.resumed_from["step"] + 1)

    def write(self, row: Mapping[str, Value]) -> None:
        step = row.get("step")
        values = [self._summary.Summary.Value(tag=key, simple_value=float(value)) for key, value in row.items()
                  if isinstance(value, (int, float)) and key != "step"]
        if values and isinstance(step, int) and not self._failed:
            try:
                if row.get(REWIND) is not None:
                    self._hide_from(step + 1)
                self._add(step, summary=self._summary.Summary(value=values))
            except Exception as error:  # its thread hands on whatever stopped it, a full disk for one
                self._failed = True
                log.warning("TensorBoard stopped (%s); the metrics stay in metrics.jsonl", error)

    def _hide_from(self, step: int) -> None:
        """Hide what was written so far of `step` and later ones."""
        self._add(step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def _add(self, step: int, *, summary: Any = None, session_log: Any = None) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary,
                                                 session_log=session_log))

    def close(self) -> None:
        if not self._failed:
            try:
                self._writer.close()
            except Exception as error:  # as above
                log.warning("TensorBoard stopped (%s); the metrics stay in metrics.jsonl", error)
