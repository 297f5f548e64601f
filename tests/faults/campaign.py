"""Kills at random moments of a run without torch; after each, what must hold of its folder is looked at.

One seed gives one series of scenarios and moments. What a process happens to be doing at a moment depends on the
machine, so that a fault that was found may need several runs of its seed.
"""

from __future__ import annotations

import mmap
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

from pretrain.errors import DataCorruption
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.holder import Holder, fences
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.publish import Manifest
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole
from tests.faults.payload import ACKNOWLEDGED, PHASES, Plan, files_of, loss_of, process, state_at
from tests.faults.traces import leftovers

SCENARIOS = {"one process": 4, "a second start as the first dies": 3, "two starts at once": 2,
             "frozen, succeeded, woken": 3}
"""What may happen, and how often in 12."""


@dataclass
class Started:
    """A forked process of the run."""

    pid: int
    phase: mmap.mmap
    code: int | None = None

    def send(self, number: int) -> None:
        """Send a signal, if it lives."""
        if not self.ended():
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, timeout_s: float = 60.0) -> int:
        """Exit code, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout_s} s, phase {PHASES[self.phase[0]]}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code


@dataclass
class Report:
    """What a campaign has seen."""

    kills: int = 0
    by_scenario: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    """Phase in which a killed process was."""
    endings: Counter[str] = field(default_factory=Counter)
    """Exit codes of processes that were not killed."""
    lives: int = 0
    """Runs that reached their end."""
    newest_moved: int = 0
    """Kills after which there was a newer checkpoint than before."""
    left_behind: int = 0
    """Kills that left temporary files, which the next start removed."""
    stale: int = 0
    """Checkpoints that a process published after it had been succeeded: they stay, and no reader counts them."""
    violations: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {key: dict(value.most_common()) if isinstance(value, Counter) else value
                for key, value in vars(self).items()}


class Campaign:
    """Lives of a run, each killed again and again until it reaches its end."""

    def __init__(self, folder: Path, seed: int, report: Report, **plan: Any) -> None:
        self._base, self._seed, self.report, self._plan = folder, seed, report, plan
        self._number = 0

    def run(self, kills: int, say: Callable[[str], None] = lambda line: None) -> Report:
        """Go on until so many processes have been killed and the last life has ended."""
        whole_s = self._undisturbed()
        while self.report.kills < kills:
            life = self._new_life()
            trial = 0
            while not life.done():
                draw = random.Random(f"{self._seed}/{self.report.lives}/{trial}")
                scenario = draw.choices(list(SCENARIOS), list(SCENARIOS.values()))[0]
                if self.report.kills >= kills or trial > 60:
                    scenario = "to its end"
                before = life.newest
                life.play(scenario, draw, whole_s)
                found = life.look()
                self.report.newest_moved += life.newest > before
                self.report.violations += [f"seed {self._seed}, life {self.report.lives}, trial {trial}, {scenario}: "
                                           f"{line}" for line in found]
                say(f"kill {self.report.kills}: {scenario}, newest {life.newest}"
                    + (f": {'; '.join(found)}" if found else ""))
                trial += 1
            again = life.start().wait()  # the command of a run that is done: it only clears up
            ends = [*life.look(), *life.look_at_the_end()] if again == 0 else [f"given again, it ends with {again}"]
            self.report.violations += [f"seed {self._seed}, life {self.report.lives}, end: {line}" for line in ends]
            self.report.lives += 1
            shutil.rmtree(life.plan.folder)
        return self.report

    def _undisturbed(self) -> float:
        """Seconds that a life takes."""
        life = self._new_life()
        start = time.monotonic()
        code = life.start().wait()
        taken = time.monotonic() - start
        problems = [*life.look(), *life.look_at_the_end()]
        assert (code, problems) == (0, []), f"even undisturbed: code {code}, {problems}\n{life.log_text()}"
        shutil.rmtree(life.plan.folder)
        return taken

    def _new_life(self) -> Life:
        folder = Path(tempfile.mkdtemp(prefix=f"life-{self.report.lives}-", dir=self._base))
        return Life(Plan(folder, **self._plan), self.report)


class Life:
    """One run folder."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.folder = RunFolder(plan.root)
        self.newest = 0
        self._log = plan.folder / "log.txt"
        self._stale: set[str] = set()

    def start(self) -> Started:
        """Fork a process that gives the command."""
        phase = mmap.mmap(-1, 1)
        pid = os.fork()
        if pid == 0:
            process(self.plan, phase, self._log)
        return Started(pid, phase)

    def log_text(self) -> str:
        """What the processes had to say."""
        return self._log.read_text() if self._log.exists() else ""

    def done(self) -> bool:
        """Whether the run has reached its end."""
        status = Status.read(self.folder) if self.plan.root.exists() else None
        return status is not None and status.state == "done"

    def play(self, scenario: str, draw: random.Random, whole_s: float) -> None:
        """Let something happen; all processes are gone afterwards."""
        moment = lambda: time.sleep(draw.uniform(0.0, 0.4 * whole_s))  # noqa: E731
        first = self.start()
        started = [first]
        if scenario == "one process":
            moment()
            self._kill(first)
        elif scenario == "two starts at once":
            started.append(self.start())
            moment()
            for one in draw.sample(started, 2):
                self._kill(one)
        elif scenario == "a second start as the first dies":
            moment()
            if draw.random() < 0.5:
                self._kill(first)
                started.append(self.start())
            else:
                started.append(self.start())
                time.sleep(draw.uniform(0.0, 0.01))
                self._kill(first)
            moment()
            self._kill(started[1])
        elif scenario == "frozen, succeeded, woken":
            moment()
            first.send(signal.SIGSTOP)
            time.sleep(self.plan.lease_timeout * 1.1)
            started.append(self.start())
            time.sleep(self.plan.lease_timeout / 4)  # for which it watches the silent one
            moment()
            first.send(signal.SIGCONT)
            moment()
            for one in draw.sample(started, 2):
                self._kill(one)
        for one in started:
            code = one.wait()
            if code >= 0:
                self.report.endings[str(code)] += 1
        self.report.by_scenario[scenario] += 1

    def _kill(self, one: Started) -> None:
        if one.ended():
            return
        phase = PHASES[one.phase[0]]
        one.send(signal.SIGKILL)
        if one.wait() == -signal.SIGKILL:
            self.report.kills += 1
            self.report.by_phase[phase] += 1

    def look(self) -> list[str]:
        """What is wrong while no process runs."""
        if not self.plan.root.exists():
            return []
        problems = []
        if "Traceback" in self.log_text():
            problems.append(f"a process failed: {self.log_text()[-600:]}")
            self._log.unlink()
        counting = self.folder.checkpoints()
        for path in self.folder.checkpoints_dir.glob("step-*"):  # whoever wrote it, counted or not
            ref = CheckpointRef.parse(path)
            problems += _faults(ref) if ref is not None else [f"{path.name} is no name of a checkpoint"]
        try:
            newest = newest_whole(self.folder)
        except DataCorruption as error:
            return [*problems, str(error)]
        step = newest.step if newest is not None else 0
        acknowledged = self._acknowledged()
        if step < max([self.newest, *acknowledged]):
            problems.append(f"went back to step {step} from {max([self.newest, *acknowledged])}")
        self.newest = step
        problems += self._kept([ref.step for ref in counting])
        problems += self._rows(step)
        problems += self._records()
        problems += self._copy()
        published = {ref.path.name for ref in self.folder.published()}
        self._stale |= published - {ref.path.name for ref in counting}
        self.report.left_behind += bool(leftovers(self.plan.root))
        return problems

    def look_at_the_end(self) -> list[str]:
        """What is wrong once the run is done."""
        problems = []
        if self.newest != self.plan.steps:
            problems.append(f"done at step {self.newest}")
        for root in (self.plan.root, self.plan.copy):
            problems += [f"{root.relative_to(self.plan.folder)} keeps {name}" for name in leftovers(root)]
        extra = self._extra([ref.step for ref in self.folder.checkpoints()])
        if extra:
            problems.append(f"keeps checkpoints of steps {sorted(extra)}, which no rule keeps")
        pointed = RunFolder(self.plan.copy).read_pointer("latest")
        if pointed is None or pointed.step != self.plan.steps:
            problems.append(f"the copy points at {pointed.path.name if pointed else None}, not at the end of the run")
        self.report.stale += len(self._stale)
        return problems

    def _acknowledged(self) -> list[int]:
        path = self.plan.folder / ACKNOWLEDGED
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def _rule(self) -> set[int]:
        saves = range(self.plan.every, self.newest + 1, self.plan.every)
        return {*saves[-self.plan.keep_last:], *(step for step in saves if step % self.plan.keep_multiples_of == 0)}

    def _extra(self, steps: list[int]) -> set[int]:
        return set(steps) - self._rule()

    def _kept(self, steps: list[int]) -> list[str]:
        problems = [f"step {step} is kept by a rule and gone" for step in sorted(self._rule() - set(steps))]
        if len(self._extra(steps)) > 4:  # one that a kill left, and what a killed mirror had pinned
            problems.append(f"steps {sorted(self._extra(steps))} are kept by no rule")
        if len(steps) != len(set(steps)):
            problems.append(f"a step counts twice: {steps}")
        return problems

    def _rows(self, newest: int) -> list[str]:
        rows = read_metrics(self.folder)
        steps = [row["step"] for row in rows]
        if steps != list(range(1, len(rows) + 1)) or len(rows) < newest:
            return [f"rows of steps {steps}, newest checkpoint {newest}"]
        return [f"a wrong row of step {row['step']}" for row in rows
                if row["loss"] != loss_of(state_at(int(row["step"])))]  # type: ignore[arg-type]

    def _records(self) -> list[str]:
        try:
            Status.read(self.folder)
            for fence in fences(self.folder.lease_dir):
                if Holder.read(self.folder.lease_dir / str(fence)) is None:
                    return [f"fence {fence} has no holder"]
            pointed = self.folder.read_pointer("latest")
        except DataCorruption as error:
            return [str(error)]
        if pointed is not None and pointed not in self.folder.checkpoints():
            return [f"latest points at {pointed.path.name}"]
        return []

    def _copy(self) -> list[str]:
        copy = RunFolder(self.plan.copy)
        refs = list(copy.published())
        problems = [fault for ref in refs for fault in _faults(ref)]
        ahead = [ref.path.name for ref in copy.checkpoints() if ref.step > self.newest]
        return [*problems, *(f"the copy is ahead: {name}" for name in ahead)]


def _faults(ref: CheckpointRef) -> list[str]:
    """Where a checkpoint is not whole, or not what it should be."""
    try:
        problems = Manifest.read(ref.path).verify(ref.path)
    except DataCorruption as error:
        return [str(error)]
    if problems:
        return problems
    expected = files_of(ref.step, state_at(ref.step))
    return [f"{ref.path / name}: other content" for name, content in expected.items()
            if (ref.path / name).read_bytes() != content]
