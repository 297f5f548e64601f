"""How far preparation has come, on the terminal or nowhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Reporter(Protocol):
    """What the pipeline tells about itself."""

    def stage(self, name: str, total_bytes: int | None) -> None:
        """A stage begins; the one before is done. `total_bytes` is None where it is not known."""

    def advance(self, size: int) -> None:
        """`size` more bytes of text are done."""


class Silent:
    """Reports nothing."""

    def stage(self, name: str, total_bytes: int | None) -> None:
        """Nothing."""

    def advance(self, size: int) -> None:
        """Nothing."""


class _Rate(ProgressColumn):
    """Average over the stage."""

    def render(self, task: Task) -> Text:
        """MB of text a second."""
        return Text(f"{task.completed / task.elapsed / 1e6:.2f} MB/s" if task.elapsed else "", "progress.data.speed")


class RichReporter:
    """A progress bar with rates a stage, on standard error; plain text where that is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(SpinnerColumn(), TextColumn("{task.description:<20}"), BarColumn(), DownloadColumn(),
                                  _Rate(), TimeElapsedColumn(), TimeRemainingColumn(),
                                  console=console or Console(stderr=True))
        self._task: TaskID | None = None

    def stage(self, name: str, total_bytes: int | None) -> None:
        """Close the bar of the stage before and open one."""
        self._close()
        self._task = self._progress.add_task(name, total=total_bytes)

    def advance(self, size: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, size)

    def _close(self) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
            self._progress.update(self._task, total=self._progress.tasks[self._task].completed)

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self._close()
        self._progress.stop()
