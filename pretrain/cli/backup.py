"""`pretrain backup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def backup(run: Annotated[Path, typer.Argument(help="run folder")],
           dest: Annotated[Path, typer.Argument(help="folder on another disk; the copy is DEST/NAME")]) -> None:
    """Copy a run's newest whole checkpoint, config, metrics and status to DEST/NAME, proven by size and SHA-256.

    The copy is a run folder: `pretrain eval` and `export` read it, and the run goes on there with `runs_dir` set to
    DEST. Safe while the run trains. Nothing that is there already is deleted.
    """
    from pretrain.errors import UserError
    from pretrain.runfolder.backup import back_up
    from pretrain.runfolder.layout import RunFolder
    from pretrain.runfolder.whole import newest_whole
    folder = RunFolder.open(run)
    ref = newest_whole(folder)
    try:
        target = back_up(folder, ref, dest)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written to ({error.strerror}: {error.filename})") from error
    print(f"{ref.path.name if ref else 'no checkpoint yet; config and metrics'} -> {target.root}")
