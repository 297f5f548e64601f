"""Kills of the real engine at random moments: two ranks through the launcher, until each run ends with its bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pretrain.runfolder.status import Status
from tests.cli.tiny_run import make_dataset
from tests.cli.warm import Forked, Warm
from tests.faults.harness import Case, new_case
from tests.faults.traces import leftovers

VICTIMS = ("rank 0", "rank 1", "all ranks", "launcher")


@dataclass
class EngineReport:
    """What the kills of the engine have shown."""

    kills: int = 0
    by_victim: Counter[str] = field(default_factory=Counter)
    by_newest: Counter[str] = field(default_factory=Counter)
    """Step of the newest whole checkpoint after a kill."""
    codes: Counter[str] = field(default_factory=Counter)
    """Exit codes of launchers of which a rank was killed."""
    lives: int = 0
    """Runs that reached their end: all with the losses, weights, moments and random state of the undisturbed one."""
    in_background: int = 0
    """Those of them that wrote their checkpoints in the background."""
    left_behind: int = 0
    violations: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {key: dict(value.most_common()) if isinstance(value, Counter) else value
                for key, value in vars(self).items()}


def kill_engine(base: Path, seed: int, kills: int, say: Callable[[str], None] = lambda line: None) -> EngineReport:
    """Kill runs of 12 steps until so many kills are made and the last run has ended."""
    report = EngineReport()
    dataset = make_dataset(base / "data")
    warm = Warm()
    try:
        whole = new_case(warm, dataset, _folder(base))
        started = time.monotonic()
        whole.finish()
        whole_s = time.monotonic() - started
        expected = whole.outcome()
        while report.kills < kills:
            draw = random.Random(f"{seed}/{report.lives}")
            background = report.lives % 2 == 1
            case = new_case(warm, dataset, _folder(base), f"checkpoint.async_save={str(background).lower()}")
            _live(case, draw, whole_s, report, kills, say)
            case.finish()
            if case.outcome() != expected:
                report.violations.append(f"seed {seed}, life {report.lives}: other bits at the end")
            report.lives += 1
            report.in_background += background
            shutil.rmtree(case.folder)
    finally:
        warm.close()
    return report


def _folder(base: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="engine-", dir=base))


def _live(case: Case, draw: random.Random, whole_s: float, report: EngineReport, kills: int,
          say: Callable[[str], None]) -> None:
    """Start and kill until the run is done or there were enough kills."""
    newest = 0
    while report.kills < kills and not _done(case):
        victim = draw.choice(VICTIMS)
        run = case.start()
        time.sleep(draw.uniform(0.0, whole_s))
        ranks = _ranks(run)
        if run.poll() is None and _strike(victim, run, ranks):
            report.kills += 1
            report.by_victim[victim] += 1
            code = run.wait(120)
            if victim != "launcher":
                report.codes[str(code)] += 1
            assert psutil.wait_procs(ranks, timeout=30)[1] == [], "ranks outlive their launcher"
            found = case.newest() if case.root.exists() else 0
            if found < newest:
                report.violations.append(f"life {report.lives}: went back from step {newest} to {found}")
            newest = found
            report.by_newest[f"step {found}"] += 1
            report.left_behind += case.root.exists() and bool(leftovers(case.root))
            say(f"kill {report.kills}: {victim}, newest {found}")
        else:
            run.wait(120)


def _done(case: Case) -> bool:
    """Whether the run has reached its end. A start that was killed early has left no status."""
    found = Status.read(case.run_folder) if case.root.exists() else None
    return found is not None and found.state == "done"


def _ranks(run: Forked) -> list[psutil.Process]:
    """Ranks that the launcher has started by now, in their order."""
    try:
        return sorted(psutil.Process(run.pid).children(), key=lambda process: process.pid)
    except psutil.NoSuchProcess:
        return []


def _strike(victim: str, run: Forked, ranks: list[psutil.Process]) -> bool:
    """Whether there was someone to kill."""
    if victim == "launcher":
        os.kill(run.pid, signal.SIGKILL)
        return True
    chosen = ranks if victim == "all ranks" else ranks[int(victim[-1]):][:1]
    for process in chosen:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return False
    return bool(chosen)
