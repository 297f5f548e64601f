"""A run without torch: lease, checkpoints of several files, retention, mirror, metrics and status, by the real code.

Its state is a chain of hashes, so that every checkpoint and the end of the run are known beforehand. What each process
is doing stands in a byte that it shares with the one that kills it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pretrain.engine.mirror import Mirror
from pretrain.errors import ExitCode, PretrainError, UserError
from pretrain.monitor.writers import MetricsWriter
from pretrain.runfolder.control import poll
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import MANIFEST, Manifest, fsync, hash_file, replace_dir
from pretrain.runfolder.retention import delete, live_pins, remove_dead_pins, to_delete
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole

PHASES = ("not started", "claiming", "cleaning", "verifying", "deciding", "stepping", "writing", "describing",
          "renaming", "pointing", "forgetting", "ending")
ACKNOWLEDGED = "acknowledged.txt"


@dataclass(frozen=True, slots=True)
class Plan:
    """A run and its folders: `folder`/runs/tiny, and its copy under `folder`/disk."""

    folder: Path
    steps: int = 40
    every: int = 2
    keep_last: int = 2
    keep_multiples_of: int = 10
    step_s: float = 0.002
    lease_timeout: float = 0.8

    @property
    def root(self) -> Path:
        """The run folder."""
        return self.folder / "runs/tiny"

    @property
    def copy(self) -> Path:
        """The copy that the mirror makes."""
        return self.folder / "disk/tiny"


def state_at(step: int) -> str:
    """The state of the run after `step` steps."""
    state = "start"
    for number in range(step):
        state = advance(state, number)
    return state


def advance(state: str, number: int) -> str:
    """One step."""
    return hashlib.sha256(f"{state} {number}".encode()).hexdigest()


def files_of(step: int, state: str) -> dict[str, bytes]:
    """Content of a checkpoint."""
    shards = {f"deepspeed/rank-{rank}.bin": f"{rank} {state} ".encode() * 700 for rank in range(4)}
    return {"state.json": json.dumps({"step": step, "state": state}).encode(), **shards}


def loss_of(state: str) -> float:
    """The metric of a step."""
    return int(state[:12], 16) / 16 ** 12


def process(plan: Plan, phase: mmap.mmap, log: Path) -> NoReturn:
    """The whole life of a process. Ends it with the exit code that `pretrain train` would have."""
    code = int(ExitCode.INTERNAL)
    run = _Run(plan, phase)
    try:
        code = run.run()
    except PretrainError as error:
        code = int(error.code)
        log.open("a").write(f"error: {error}\n")
    except BaseException as error:
        # Whoever takes a run over removes what its former holder has half-written.
        if isinstance(error, FileNotFoundError) and run.lease is not None and not run.lease.still_held():
            code = int(ExitCode.USER)
        else:
            log.open("a").write(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)


class _Run:
    def __init__(self, plan: Plan, phase: mmap.mmap) -> None:
        self.plan = plan
        self.folder = RunFolder(plan.root)
        self._phase = phase
        self._state, self._step = "start", 0
        self._resumed: CheckpointRef | None = None
        self.lease: Lease | None = None

    def _enter(self, phase: str) -> None:
        self._phase[0] = PHASES.index(phase)

    def run(self) -> int:
        """From the claim to the verdict."""
        self._enter("claiming")
        RunFolder.create(self.plan.root)
        self.lease = lease = Lease.acquire(self.folder, lease_timeout=self.plan.lease_timeout)
        with lease.beating(self.plan.lease_timeout / 8):
            self._begin(lease)
            self._train(lease)
        lease.release()
        return int(ExitCode.DONE)

    def _begin(self, lease: Lease) -> None:
        self._enter("cleaning")
        self.folder.clean_temporaries(lease.fence)
        remove_dead_pins(self.folder)
        self._enter("verifying")
        ref = newest_whole(self.folder)
        self._enter("deciding")
        if ref is None:
            lease.set_fresh()
        else:
            self._resumed = ref
            lease.set_resumed_from(ref.step, ref.fence, hash_file(ref.path / MANIFEST))
            stored = json.loads((ref.path / "state.json").read_text())
            self._step, self._state = stored["step"], stored["state"]
        self.folder.config_file.write_text("name: tiny\n")
        Status(lease.fence, step=self._step, started=time.time()).write(self.folder)

    def _train(self, lease: Lease) -> None:
        writer = MetricsWriter(self.folder, (), False, None, lease.fence)
        mirror = Mirror(self.folder, self.plan.copy.parent, every=2)
        saves = self._step // self.plan.every
        if self._resumed is not None:
            mirror.catch_up(self._resumed, saves)
            self._forget(self._resumed)
        while self._step < self.plan.steps:
            self._enter("stepping")
            self._state = advance(self._state, self._step)
            self._step += 1
            time.sleep(self.plan.step_s)
            poll(self.folder)
            writer.write({"step": self._step, "loss": loss_of(self._state)})
            if self._step % self.plan.every == 0:
                writer.sync()
                saves += 1
                ref = self._save(lease)
                mirror.offer(ref, saves)
                self._forget(ref)
                Status(lease.fence, step=self._step).write(self.folder)
        self._enter("ending")
        mirror.close(10.0)
        self._forget(self.folder.checkpoints()[0])
        writer.close()
        Status(lease.fence, step=self._step).ended(ExitCode.DONE, "length reached").write(self.folder)

    def _save(self, lease: Lease) -> CheckpointRef:
        """As the engine does it."""
        self._enter("writing")
        temporary = self.folder.tmp_checkpoint(self._step, lease.fence)
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "deepspeed").mkdir(parents=True)
        hashes = {}
        for name, content in files_of(self._step, self._state).items():
            with open(temporary / name, "xb") as file:
                for at in range(0, len(content), 8192):
                    file.write(content[at:at + 8192])
            fsync(temporary / name)
            hashes[name] = hashlib.sha256(content).hexdigest()
        self._enter("describing")
        if not lease.still_held():
            raise UserError(f"{self.folder.root}: another process took this run over")
        ref = self.folder.final_checkpoint(self._step, lease.fence)
        Manifest.collect(temporary, hashes, step=self._step, k=self._step, fence=lease.fence, world=4, stage=2,
                         dtype="fp32").write(temporary)
        self._enter("renaming")
        replace_dir(temporary, ref.path)
        self._enter("pointing")
        self.folder.write_pointer("latest", ref)
        if lease.still_held():  # whoever takes over from now on sees it
            with open(self.plan.folder / ACKNOWLEDGED, "a") as file:
                file.write(f"{self._step}\n")
        return ref

    def _forget(self, latest: CheckpointRef) -> None:
        self._enter("forgetting")
        known = self.folder.checkpoints()
        for ref in to_delete(known, keep_last=self.plan.keep_last, keep_multiples_of=self.plan.keep_multiples_of,
                             pinned=[ref for ref in known if live_pins(ref)], latest=latest):
            delete(ref)
