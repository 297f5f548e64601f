"""What all benchmarks share: the machine, alternating pairs, medians with their spread, and where results are kept."""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.monitor.environment import describe_environment

if TYPE_CHECKING:
    from pretrain.engine.distributed import World

RESULTS = Path(__file__).parent / "results"
PAIRS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one quantity."""

    unit: str
    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Summary:
        """Summarise at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(unit, median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} {self.unit} ({self.low:.4g} to {self.high:.4g}, n={self.n})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two measurements taken in turn. `ratio` is of each pair's own two values, so that slow drift cancels."""

    ours: Summary
    other: Summary
    ratio: Summary


def compare(ours: Callable[[], float], other: Callable[[], float], *, unit: str, pairs: int = PAIRS) -> Comparison:
    """Measure both once to warm up, then in pairs whose order alternates. The ratio is ours / other."""
    ours(), other()
    mine, theirs = [], []
    for pair in range(pairs):
        if pair % 2 == 0:
            mine.append(ours())
            theirs.append(other())
        else:
            theirs.append(other())
            mine.append(ours())
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return Comparison(Summary.of(mine, unit), Summary.of(theirs, unit), Summary.of(ratios, "x"))


def rounds(measures: dict[str, Callable[[], float]], *, unit: str, n: int = PAIRS) -> dict[str, Summary]:
    """Measure several things in turn, n rounds after one to warm up; every other round goes backwards."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(n + 1):
        order = list(measures) if number % 2 == 0 else list(reversed(measures))
        for name in order:
            value = measures[name]()
            if number:
                values[name].append(value)
    return {name: Summary.of(found, unit) for name, found in values.items()}


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all its threads, for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, without that of freeing what it returns."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def lone_world() -> World:
    """A world of this process alone."""
    from pretrain.engine.distributed import join
    from pretrain.engine.ranks import RankEnvironment
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return join(RankEnvironment(0, 0, 1, "127.0.0.1", port), timeout_s=60.0)


def machine() -> dict[str, Any]:
    """Hardware, versions and source commit; nothing that names a host or a user."""
    found = describe_environment()
    return {key: found[key] for key in ("python", "packages", "hardware", "source")} | {"load": os.getloadavg()}


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Keep the results of a benchmark (Summary and Comparison allowed at any depth of dicts) and say where."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(),
               "results": results}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    temporary.replace(path)
    print(f"written to {path}")
    return path
