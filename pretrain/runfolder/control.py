"""Requests to a running process, as small files in `control/`. `touch runs/NAME/control/save` works as well."""

from __future__ import annotations

import logging
import os

from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_text_atomic

log = logging.getLogger(__name__)
REQUESTS: dict[str, str] = {
    "save": "write a checkpoint at the next step",
    "stop": "save and leave with exit code 85, resumable",
    "save_and_stop": "the same as stop",
    "eval": "run the evaluations now",
    "reload_lr": "take the learning rate given as value, or read the one of config.yaml again",
}
_TAKEN = ".taken-"


def request(folder: RunFolder, name: str, value: str | None = None) -> None:
    """Ask the holder of `folder` for `name`. Only `reload_lr` has a value: a learning rate. Raises UserError."""
    if name not in REQUESTS:
        raise UserError(f"{name}: is no request; known: {', '.join(REQUESTS)}")
    if value is not None:
        if name != "reload_lr":
            raise UserError(f"{name}: takes no value, {value!r} was given")
        learning_rate(value)
    try:
        folder.control_dir.mkdir(exist_ok=True)
        write_text_atomic(folder.control_dir / name, (value or "") + "\n")
    except OSError as error:
        raise UserError(f"{folder.control_dir}: cannot be written to ({error.strerror})") from error


def poll(folder: RunFolder) -> dict[str, str]:
    """Take the requests that are waiting: name to value ("" for none). Each is handed out once, to one caller.

    What is not known is removed and reported in the log. A request taken by a process that dies before it acts is lost.
    """
    taken: dict[str, str] = {}
    try:
        names = sorted(name for name in os.listdir(folder.control_dir) if not name.startswith("."))
    except FileNotFoundError:
        return taken
    for name in names:
        mine = folder.control_dir / f"{_TAKEN}{os.getpid()}-{name}"
        try:
            os.rename(folder.control_dir / name, mine)
            value = mine.read_text(encoding="utf-8", errors="replace").strip()
            mine.unlink()
        except FileNotFoundError:  # taken by another process
            continue
        except OSError as error:  # a folder that someone put here
            log.warning("%s: request not taken (%s)", folder.control_dir / name, error.strerror)
            continue
        if name in REQUESTS:
            taken[name] = value
        else:
            log.warning("%s: is no request and was removed; known: %s", folder.control_dir / name, ", ".join(REQUESTS))
    return taken


def learning_rate(value: str) -> float:
    """The value of a `reload_lr` request as a number. Raises UserError."""
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 10.0:
        raise UserError(f"reload_lr: {value!r} is no learning rate; a number between 0 and 10 would be right")
    return rate
