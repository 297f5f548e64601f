"""`pretrain runs`: what runs there are and how they do."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.options import JsonOption
from pretrain.errors import PretrainError, UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List runs.")


@app.callback()
def _group() -> None:
    """List runs."""


@app.command("ls")
def ls(directory: Annotated[Path, typer.Argument(help="folder of run folders, or one run folder")] = Path("runs"),
       as_json: JsonOption = False) -> None:
    """State, step, loss, speed, age and size of each run, the newest first."""
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such folder")
    rows = sorted((_describe(path) for path in _run_folders(directory)), key=lambda row: row["age_seconds"])
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    branches = ["branch of"] if any(row["branch"] for row in rows) else []
    table = Table("run", "state", "step", "loss", "tokens/s", "age", "size", *branches, box=None, pad_edge=False)
    for row in rows:
        total = f"/{row['total_steps']}" if row["total_steps"] else ""
        went_back = f", {row['rewinds']} x back" if row["rewinds"] else ""
        table.add_row(row["name"], row["state"] + went_back, f"{row['step']}{total}", _number(row["loss"], ".4f"),
                      _number(row["tokens_per_second"], ",.0f"), _age(row["age_seconds"]), _size(row["bytes"]),
                      *(_origin(row["branch"]) for _ in branches))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # in a pipe rich would cut at 80
    console.print(table if rows else f"{directory}: no runs")


def _run_folders(directory: Path) -> list[Path]:
    from pretrain.runfolder.layout import is_run_folder
    if is_run_folder(directory):
        return [directory]
    return [path for path in directory.iterdir() if path.is_dir() and is_run_folder(path)]


def _describe(path: Path) -> dict[str, Any]:
    from pretrain.monitor.rows import last_row
    from pretrain.runfolder.branch import Lineage
    from pretrain.runfolder.layout import RunFolder
    from pretrain.runfolder.lease import live_holder
    from pretrain.runfolder.status import Status
    folder = RunFolder.open(path)
    files = [file.stat() for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    row: dict[str, Any] = {"name": path.name, "state": "unknown", "step": 0, "total_steps": None, "loss": None,
                           "tokens_per_second": None, "rewinds": 0, "branch": None,
                           "bytes": sum(file.st_size for file in files)}
    updated = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    try:
        status, holder, lineage = Status.read(folder), live_holder(folder), Lineage.read(folder)
        if lineage is not None:
            row["branch"] = asdict(lineage)
        if status is not None:
            row |= {"state": status.state, "step": status.step, "total_steps": status.total_steps,
                    "rewinds": status.rewinds}
            updated = status.updated
        if holder is None and row["state"] in ("running", "unknown"):
            row["state"] = "dead" if status is not None else "empty"
        metrics = last_row(folder, "loss")
        if metrics is not None:
            loss = metrics["loss"]
            row["loss"] = loss if isinstance(loss, float) and math.isfinite(loss) else None
            row["tokens_per_second"] = metrics.get("tokens_per_second")
            row["step"] = max(row["step"], int(metrics["step"] or 0))
    except PretrainError as error:
        row["state"] = f"unreadable: {error}"
    row["age_seconds"] = max(0.0, time.time() - updated)
    return row


def _origin(branch: dict[str, Any] | None) -> str:
    return "" if branch is None else f"{Path(branch['parent']).name} at step {branch['step']}"


def _number(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
