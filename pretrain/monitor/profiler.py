"""A torch profiler trace of a few updates, for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class StepProfiler:
    """Records the updates from `first` to `last`, both included, into `folder`."""

    def __init__(self, folder: Path, first: int, last: int, rank: int) -> None:
        self._folder = folder
        self._first = first
        self._last = last
        self._rank = rank
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        """Called before the update numbered `step` (from 1) runs. A run that resumes in the middle records the rest."""
        if self._profile is not None and step > self._last:
            self.close()
        elif self._profile is None and self._first <= step <= self._last:
            import torch
            self._first = step
            self._profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profile.__enter__()

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.__exit__(None, None, None)
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"steps-{self._first}-{self._last}.rank{self._rank}.json"
            profile.export_chrome_trace(str(path))
            log.info("profiler trace written to %s", path)
