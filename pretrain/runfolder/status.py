"""`status.json`: where a run stands and how it ended. Under launchers that swallow exit codes it is the verdict."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.errors import DataCorruption, ExitCode
from pretrain.runfolder.holder import fences
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic

State = Literal["running", "done", "failed", "refused", "corrupt", "diverged", "check_failed", "hang", "stopped",
                "interrupted"]
VERDICTS: dict[ExitCode, State] = {
    ExitCode.DONE: "done",
    ExitCode.INTERNAL: "failed",
    ExitCode.USER: "refused",
    ExitCode.CORRUPT: "corrupt",
    ExitCode.DIVERGED: "diverged",
    ExitCode.FAILED_CHECK: "check_failed",
    ExitCode.HANG: "hang",
    ExitCode.STOPPED: "stopped",
    ExitCode.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True, slots=True)
class Status:
    """State of a run as its holder last wrote it."""

    fence: int
    state: State = "running"
    code: int | None = None
    """Exit code; None while running."""
    step: int = 0
    k: int = 0
    total_steps: int | None = None
    reason: str = ""
    """Why it ended as it did, in a word or two: "length reached", "SIGTERM", "max_hours"."""
    message: str = ""
    """The one line that a user was shown, if any."""
    started: float = 0.0
    """Unix time of this start."""
    updated: float = 0.0
    """Unix time of this record."""
    restarts: int = 0
    rewinds: int = 0
    """Times that the run went back to a checkpoint by itself (`train.on_spike: rewind`)."""

    def ended(self, code: ExitCode, reason: str, message: str = "") -> Status:
        """The verdict of a process that leaves with `code`."""
        return replace(self, state=VERDICTS[code], code=int(code), reason=reason, message=message)

    @property
    def resumable(self) -> bool:
        """Whether the same command would go on from here."""
        return self.code == int(ExitCode.STOPPED)

    def write(self, folder: RunFolder) -> Status:
        """Write it, with the time, and return what was written.

        It stands under the fence of its writer and once more in `status.json`, so that a stale holder that wakes up
        and overwrites the latter hides nothing: `read` then takes the record of the newest fence.
        """
        status = replace(self, updated=time.time())
        own = folder.lease_dir / str(self.fence)
        if own.is_dir():
            write_json_atomic(own / folder.status_file.name, asdict(status))
        claimed = fences(folder.lease_dir)
        if not claimed or claimed[-1] <= self.fence:
            write_json_atomic(folder.status_file, asdict(status))
        return status

    @classmethod
    def read(cls, folder: RunFolder) -> Status | None:
        """The status that the newest holder wrote; None where it wrote none yet. Raises DataCorruption."""
        status = _load(folder.status_file)
        claimed = fences(folder.lease_dir)
        if claimed and (status is None or status.fence != claimed[-1]):
            return _load(folder.lease_dir / str(claimed[-1]) / folder.status_file.name)
        return status


def _load(path: Path) -> Status | None:
    try:
        return Status(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataCorruption(f"{path}: cannot be read ({error})") from error
