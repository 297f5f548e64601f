"""`python -m benchmarks [NAME...]`: run all benchmarks, or the named ones, each in a process of its own."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

HELPERS = {"__main__", "harness", "peer_worker", "peers", "planted"}
CAMPAIGNS = {"faults", "afrb_tables", "afrb_capacity", "afrb_collisions"}
"""Run by name only: they measure nothing and take minutes, or need models that were trained."""


def names() -> list[str]:
    """Every module of this folder that is a benchmark."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in found if module.name not in HELPERS)


def main(chosen: list[str]) -> int:
    """Run benchmarks; 0 where all ran through, 2 for an unknown name."""
    known = names()
    unknown = [name for name in chosen if name not in known]
    if unknown:
        print(f"error: no benchmark {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in chosen or [name for name in known if name not in CAMPAIGNS]:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-P", "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
