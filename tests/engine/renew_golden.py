"""Rewrite golden.json from a run of this machine: `python -m tests.engine.renew_golden`."""

import json
import tempfile
from pathlib import Path

from tests.engine.test_worlds import GOLDEN, golden_key
from tests.engine.world import launch_cases

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = launch_cases("tests.engine.one_rank", 1, Path(folder))["golden"]
    GOLDEN.write_text(json.dumps({"key": golden_key(), "losses": found}, indent=1) + "\n")
