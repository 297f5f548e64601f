"""Exit codes between the batch script and its helper."""

from __future__ import annotations

NOTHING_TO_DO = 64
"""Of `begin`: the run is done."""
REQUEUE = 75
"""Of `end`: the job is to put itself back into the queue."""
