"""`pretrain control`: ask a running process for something."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def control(run: Annotated[Path, typer.Argument(help="run folder")],
            request: Annotated[str, typer.Argument(help="save, stop, save_and_stop, eval or reload_lr")],
            value: Annotated[str | None, typer.Option(help="learning rate, for reload_lr")] = None) -> None:
    """Ask a running run to save, stop, evaluate or reload its learning rate, at its next step."""
    from pretrain.errors import UserError
    from pretrain.runfolder.control import request as ask
    from pretrain.runfolder.layout import RunFolder
    from pretrain.runfolder.lease import live_holder
    from pretrain.runfolder.status import Status
    folder = RunFolder.open(run)
    holder, status = live_holder(folder), Status.read(folder)
    if holder is None and status is not None and status.state == "done":
        raise UserError(f"{run}: is done at step {status.step}; no process is left to {request}, and none will be "
                        "before train.length is raised")
    ask(folder, request, value)
    if holder is None:
        print(f"{request}: left for the next start; no process holds {run} now")
    else:
        print(f"{request}: left for process {holder.process.pid} on {holder.process.host} (fence {holder.fence})")
