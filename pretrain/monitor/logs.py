"""Logging of a run: rank 0 speaks on the console, everything worth keeping goes to `train.log` with its rank."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from pretrain.errors import UserError

LEVELS = ("debug", "info", "warning", "error")
_OURS = "pretrain-"
_NOISY = ("DeepSpeed", "transformers", "datasets", "torch", "urllib3", "filelock", "fsspec", "matplotlib", "asyncio")


def setup_logging(level: str, log_file: Path | None, rank: int) -> Console:
    """Send log records of this process where they belong, and return the console that they share with progress.

    Rank 0 writes records from `level` up to the console (rich on a terminal, plain lines else) and to `log_file`. Other
    ranks write warnings and errors to `log_file`, or to the console where there is none. A record whose `console` is
    False (`extra={"console": False}`) goes to the file only. May be called again; handlers are replaced, not added.
    Libraries that talk much are heard from warnings up. Raises UserError for an unknown level or an unwritable file.
    """
    if level not in LEVELS:
        raise UserError(f"--log-level: {level!r} is unknown; one of {', '.join(LEVELS)} would be right")
    console = Console(stderr=True)
    threshold = level.upper() if rank == 0 else logging.WARNING
    root = logging.getLogger()
    for old in list(root.handlers):  # ours, and the plain one that logging.basicConfig sets up
        if (old.get_name() or "").startswith(_OURS) or type(old) is logging.StreamHandler:
            root.removeHandler(old)
            old.close()
    if log_file is not None:
        _add(root, "file", _open(log_file), threshold, rank)
    if rank == 0 or log_file is None:
        on_terminal = rank == 0 and console.is_terminal
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S") if on_terminal \
            else logging.StreamHandler(sys.stderr)
        handler.addFilter(lambda record: getattr(record, "console", True))
        _add(root, "console", handler, threshold, rank, bare=on_terminal)
    root.setLevel(threshold)
    for name in _NOISY:
        noisy = logging.getLogger(name)
        noisy.setLevel(logging.WARNING)
        noisy.handlers.clear()  # they bring handlers of their own, which would print every record twice
        noisy.propagate = True
    logging.captureWarnings(True)
    return console


class _LogFile(logging.FileHandler):
    """A file that loses records where its disk is full; the console has them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Show no traceback on the terminal for it."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what it could not take in is gone."""
        with contextlib.suppress(OSError):
            super().close()


def _open(log_file: Path) -> logging.Handler:
    try:
        return _LogFile(log_file, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{log_file}: cannot be written to ({error.strerror})") from error


def _add(root: logging.Logger, name: str, handler: logging.Handler, threshold: str | int, rank: int,
         bare: bool = False) -> None:
    """Attach `handler`; `bare` leaves time and level to it."""
    layout = "%(message)s" if bare else f"%(asctime)s rank {rank} %(levelname)-7s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.setLevel(threshold)
    handler.set_name(_OURS + name)
    root.addHandler(handler)
