"""Which checkpoints a run keeps, and the pointers at them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pretrain.config.run import CheckpointConfig
from pretrain.engine import checkpoint
from pretrain.engine.build import Engine
from pretrain.engine.mirror import Mirror
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.retention import delete, live_pins, to_delete

_log = logging.getLogger("pretrain")


class Keeper:
    """Saves, points and forgets. Rank 0 alone touches pointers and deletes."""

    def __init__(self, folder: RunFolder, lease: Lease | None, config: CheckpointConfig,
                 keep_every_steps: int | None, mirror: Mirror | None) -> None:
        self.folder = folder
        self._lease = lease
        self._config = config
        self._keep_every_steps = keep_every_steps
        self._mirror = mirror

    @property
    def notice(self) -> str:
        """What the status of the run should say about its checkpoints; mostly nothing."""
        return self._mirror.problem if self._mirror is not None else ""

    def close(self, wait_s: float = 30.0) -> None:
        """End what runs in the background, within about `wait_s` seconds."""
        if self._mirror is not None:
            self._mirror.close(wait_s)

    def save(self, engine: Engine, snapshot: checkpoint.Snapshot, *, best_metric: str | None) -> CheckpointRef:
        """Write a checkpoint; where it is the best by `best_metric`, point at it; then apply retention. Collective.

        Where a new one is written, the count of saves in the snapshot's state rises by one.
        """
        ref = engine.world.on_main(lambda: self._existing(snapshot.state))
        if ref is None:
            snapshot.state["saves"] += 1
            ref = checkpoint.save(engine, self.folder, self._lease, snapshot)
            if engine.world.is_main:
                _log.info("[CHECKPOINT] Saved -> %s", ref.path)
            if self._mirror is not None:
                self._mirror.offer(ref, snapshot.state["saves"])
        if engine.world.is_main:
            if best_metric is not None:
                self.folder.write_pointer(f"best-{best_metric}", ref)
            self._forget(snapshot.state["best_steps"], ref)
        return ref

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
        known = self.folder.checkpoints()
        count = self._config.keep_best
        keep_best = [(step, 0.0) for step in best_steps[-count:]] if count else []
        doomed = to_delete(known, keep_last=self._config.keep_last, keep_best=keep_best, latest=latest,
                           keep_multiples_of=self._keep_every_steps, pinned=[r for r in known if live_pins(r)])
        for ref in doomed:
            try:
                delete(ref)
            except OSError as error:
                _log.warning("%s: could not be removed (%s)", ref.path, error)
