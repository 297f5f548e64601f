"""Random kills: of a run without torch that drives the real run-folder code, and of the real engine.

    python -P -m benchmarks.faults [--seed N] [--kills N] [--engine-kills N] [--no-record]

After each kill the folder is looked at: the newest checkpoint is whole, nothing that was acknowledged is lost, progress
never goes back, retention keeps what its rules say, rows and copies agree; at the end of each run its content is
right and nothing half-made is left. The engine must end with the bits of an undisturbed run.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_results
from tests.faults.campaign import Campaign, Report
from tests.faults.engine_campaign import kill_engine

SEED, KILLS, ENGINE_KILLS = 20261121, 100, 10


def table(title: str, counts: dict[str, int]) -> list[str]:
    """A small table of markdown."""
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts.items()), ""]


def page(results: dict[str, Any]) -> str:
    """The record for people."""
    plain, engine = results["without torch"], results["engine"]
    lines = ["# Random kills", "",
             f"Seed {results['seed']}. `make faults` makes this page, `--seed N` another one.",
             "",
             "## A run without torch", "",
             f"{plain['kills']} processes killed over {plain['lives']} runs of 40 steps, {plain['seconds']:.0f} s. "
             f"{plain['left_behind']} times something half-made was left, and gone after the next start. "
             f"Violations: {len(plain['violations'])}.", "",
             *table("what happened", plain["by_scenario"]),
             *table("what the killed process was doing", plain["by_phase"]),
             *table("exit code of the others", plain["endings"]),
             "## The engine, two ranks", "",
             f"{engine['kills']} kills over {engine['lives']} runs of 12 steps ({engine['in_background']} with "
             f"`checkpoint.async_save`), {engine['seconds']:.0f} s. Runs that ended with other bits, or went back: "
             f"{len(engine['violations'])}.", "",
             *table("killed", engine["by_victim"]), *table("newest checkpoint afterwards", engine["by_newest"])]
    return "\n".join(lines)


def main() -> int:
    """0 where nothing was violated, else 1."""
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.faults")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--kills", type=int, default=KILLS, help="of the run without torch")
    parser.add_argument("--engine-kills", type=int, default=ENGINE_KILLS)
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of what the killed processes have to say only tracebacks matter
    print(f"seed {chosen.seed}", flush=True)
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        started = time.monotonic()
        plain = Campaign(base, chosen.seed, Report()).run(chosen.kills, lambda line: print(line, flush=True))
        half = time.monotonic()
        engine = kill_engine(base, chosen.seed, chosen.engine_kills, lambda line: print(line, flush=True))
        ended = time.monotonic()
    finally:
        shutil.rmtree(base, ignore_errors=True)
    results = {"seed": chosen.seed, "without torch": {**plain.as_json(), "seconds": half - started},
               "engine": {**engine.as_json(), "seconds": ended - half}}
    print(page(results))
    if not chosen.no_record:
        write_results("faults", results)
        (RESULTS / "faults.md").write_text(page(results))
    violations = [*plain.violations, *engine.violations]
    for line in violations:
        print(f"violated: {line}", file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
