"""Which checkpoints a run keeps, and the pointers at them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config.run import CheckpointConfig
from pretrain.engine import checkpoint
from pretrain.engine.build import Engine
from pretrain.engine.distributed import World
from pretrain.engine.mirror import Mirror
from pretrain.engine.state import RunState
from pretrain.engine.writing import unwritable
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.retention import delete, live_pins, to_delete

_log = logging.getLogger("pretrain")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint that is being written, and what follows once it is there."""

    saving: checkpoint.Saving
    number: int | None
    """Among the saves that are counted for the mirror; None where it is not."""
    best_metric: str | None
    best_steps: list[int]


class Keeper:
    """Saves, points and forgets, one checkpoint at a time. Rank 0 alone touches pointers and deletes."""

    def __init__(self, folder: RunFolder, lease: Lease | None, config: CheckpointConfig,
                 keep_every_steps: int | None, mirror: Mirror | None) -> None:
        self.folder = folder
        self._lease = lease
        self._config = config
        self._keep_every_steps = keep_every_steps
        self._mirror = mirror
        self._pending: _Pending | None = None
        self._last: tuple[list[int], CheckpointRef] | None = None
        """Best steps and newest checkpoint, as retention was last applied. Rank 0's."""

    @property
    def notice(self) -> str:
        """What the status of the run should say about its checkpoints; mostly nothing."""
        return self._mirror.problem if self._mirror is not None else ""

    def close(self, wait_s: float = 30.0) -> None:
        """End what runs in the background, within about `wait_s` seconds; what the mirror has held can go now."""
        if self._mirror is not None:
            self._mirror.close(wait_s)
            if self._last is not None and self._lease is not None and self._lease.still_held():
                self._forget(*self._last)

    def catch_up(self, ref: CheckpointRef, state: RunState, best_metric: str) -> None:
        """Do what the process that wrote `ref`, of `state`, was killed before it did: point, copy, forget. Rank 0 only.

        A failure here stops nothing.
        """
        best = next((known for known in self.folder.checkpoints() if state.best_steps[-1:] == [known.step]), None)
        if self._config.keep_best and best is not None:
            pointer = self.folder.pointer_file(f"best-{best_metric}")
            try:
                if not pointer.exists() or pointer.read_text().strip() != best.path.name:
                    self.folder.write_pointer(f"best-{best_metric}", best)
            except OSError as error:
                _log.warning("%s: not written (%s)", pointer, error.strerror)
        if self._mirror is not None and state.counted:
            self._mirror.catch_up(ref, state.saves)
        self._forget(state.best_steps, ref)

    def begin(self, engine: Engine, snapshot: checkpoint.Snapshot, *, best_metric: str | None, to_host: bool,
              scheduled: bool) -> None:
        """Begin to write a checkpoint, which `publish` ends; before that there is none of it. Collective.

        `best_metric`: it is the best by this one, and will be pointed at. With `to_host` training may go on meanwhile,
        with a copy of the state being written. Where a new one is written that is `scheduled`, or every save is copied
        anyway, the count of saves in the snapshot's state rises by one.
        """
        assert self._pending is None
        best_steps = list(snapshot.state["best_steps"])
        ref = engine.world.on_main(lambda: self._existing(snapshot.state))
        if ref is not None:
            self._keep(engine.world, ref, best_metric, best_steps)
            return
        mirror = self._config.mirror
        counted = scheduled or (mirror is not None and mirror.every == 1)
        snapshot.state["counted"] = counted
        snapshot.state["saves"] += counted
        saving = checkpoint.begin(engine, self.folder, self._lease, snapshot, to_host=to_host)
        self._pending = _Pending(saving, snapshot.state["saves"] if counted else None, best_metric, best_steps)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun and not published. The same on every rank."""
        return self._pending is not None

    @property
    def ended(self) -> bool:
        """Whether this rank has written its part of the pending checkpoint, or failed to."""
        pending = self._pending  # the watch asks from another thread
        return pending is not None and pending.saving.writing.ended

    @property
    def progress(self) -> int:
        """Rises while this rank's part of the pending checkpoint is being written."""
        pending = self._pending
        return pending.saving.writing.progress if pending is not None else 0

    def publish(self, engine: Engine) -> None:
        """End what `begin` began: name the checkpoint, point at it, copy it, apply retention. Collective.

        Waits for the ranks that are not done with their part. Raises UserError where a disk did not take it in.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            ref = pending.saving.publish()
        finally:
            self._pending = None
        if engine.world.is_main:
            _log.info("[CHECKPOINT] Saved -> %s", ref.path)
        if self._mirror is not None and pending.number is not None:
            self._mirror.offer(ref, pending.number)
        self._keep(engine.world, ref, pending.best_metric, pending.best_steps)

    def _keep(self, world: World, ref: CheckpointRef, best_metric: str | None, best_steps: list[int]) -> None:
        def point() -> None:
            checkpoint.refuse_if_taken_over(self.folder, self._lease)
            try:
                self.folder.write_pointer(f"best-{best_metric}", ref)
            except OSError as error:
                raise unwritable(error) from None

        if best_metric is not None:
            world.on_main(point)
        if world.is_main:
            self._forget(best_steps, ref)

    def _existing(self, state: Mapping[str, Any]) -> CheckpointRef | None:
        """The checkpoint of this step that this process has written already, where it needs no replacement.

        It does where the state has changed since at the same step: skipped batches, another learning rate, a verdict.
        """
        assert self._lease is not None
        ref = self.folder.final_checkpoint(int(state["step"]), self._lease.fence)
        if not ref.path.exists():
            return None
        stored = json.loads((ref.path / "state.json").read_text())["state"]
        if stored == json.loads(json.dumps(state)):
            return ref
        if live_pins(ref):
            _log.warning("%s: is being read and keeps its older state: %s", ref.path,
                         ", ".join(sorted(key for key, value in state.items() if stored.get(key) != value)))
            return ref
        return None

    def _forget(self, best_steps: list[int], latest: CheckpointRef) -> None:
        """Delete what no rule keeps. A failure here never stops training."""
        self._last = best_steps, latest
        known = self.folder.checkpoints()
        count = self._config.keep_best
        doomed = to_delete(known, keep_last=self._config.keep_last, best_steps=best_steps[-count:] if count else (),
                           keep_multiples_of=self._keep_every_steps, pinned=[r for r in known if live_pins(r)],
                           latest=latest)
        for ref in doomed:
            try:
                delete(ref)
            except OSError as error:
                _log.warning("%s: could not be removed (%s)", ref.path, error)
