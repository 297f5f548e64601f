"""Weights & Biases, if asked for: one run there per run folder, across restarts, and never a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pretrain.errors import UserError
from pretrain.runfolder.publish import write_text_atomic

log = logging.getLogger(__name__)
ID_FILE = "wandb-id"


class WandbOptions(TypedDict):
    """What is sent beside the metrics."""

    project: str
    name: str
    config: Mapping[str, Any]


class WandbRun:
    """A run at Weights & Biases. `WANDB_MODE=offline` keeps it in the run folder for `wandb sync`."""

    def __init__(self, root: Path, options: WandbOptions) -> None:
        """Start, or go on with, the run whose id is kept in the run folder.

        Raises UserError where the package is not installed. Where the service cannot be reached, warns and goes on.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("monitor.wandb: the package wandb is not installed; `pip install 'pretrain[wandb]'` "
                            "or set monitor.wandb=false") from error
        id_file = root / ID_FILE
        if not id_file.exists():
            write_text_atomic(id_file, wandb.util.generate_id() + "\n")
        self._run: Any = None
        try:
            self._run = wandb.init(project=options["project"], name=options["name"], config=dict(options["config"]),
                                   id=id_file.read_text().strip(), resume="allow", dir=str(root))
        except Exception as error:  # whatever their client raises, training matters more
            self._give_up("cannot start", error)

    def log(self, row: Mapping[str, float | int | str | None]) -> None:
        """Send one row under its `step`."""
        if self._run is not None:
            try:
                self._run.log({key: value for key, value in row.items() if key != "step"}, step=row.get("step"))
            except Exception as error:
                self._give_up("stopped", error)

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up("did not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        log.warning("Weights & Biases %s (%s); the metrics stay in metrics.jsonl", what, error)
        self._run = None
