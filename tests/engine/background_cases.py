"""Checkpoints that are written while training goes on, against those that it waits for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pretrain.engine import checkpoint, writing
from pretrain.engine.distributed import World
from pretrain.engine.stopping import SAVE, STOP
from pretrain.engine.trainer import Trainer
from pretrain.errors import PretrainError
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest
from tests.engine import rewind_cases
from tests.engine.rewind_cases import digest
from tests.engine.running import finish, start

STAGES = {"0": {"zero_stage": 0}, "1": {"zero_stage": 1}, "2": {"zero_stage": 2}, "3": {"zero_stage": 3},
          "3-bf16": {"zero_stage": 3, "precision": "bf16"}}
SAVED, END = 7, 14
ASIDE = "waited"
BEHIND = {"async_save": True, "keep_last": 9}


def sections(key: str) -> dict[str, Any]:
    """Dropout, hooks, frozen weights: everything that a checkpoint holds."""
    return {"model": {"dropout": 0.2, "hooked": True}, "engine": STAGES[key], "train": {"length": f"{END} steps"}}


def advance(trainer: Trainer, step: int) -> None:
    """Train up to `step`."""
    while trainer.state.step < step:
        trainer.step()


@contextlib.contextmanager
def held(world: World, seconds: float = 60.0) -> Iterator[threading.Event]:
    """No rank begins to write in the background while the body runs, or for so many seconds.

    Once the event that it is given is set, only the last rank is held back.
    """
    run, go, others = writing.Writing._run, threading.Event(), threading.Event()

    def late(self: writing.Writing) -> None:
        if ASIDE not in str(self._folder):
            (go if world.rank == world.size - 1 else others).wait(seconds)
        run(self)

    writing.Writing._run = late  # type: ignore[method-assign]
    try:
        yield others
    finally:
        go.set()
        others.set()
        writing.Writing._run = run  # type: ignore[method-assign]


def written(trainer: Trainer) -> None:
    """Wait until this rank has written its part."""
    assert trainer.keeper._pending is not None
    assert trainer.keeper._pending.saving.writing.wait(60)


def steps_of(trainer: Trainer) -> list[int]:
    """Steps of the checkpoints that can be seen."""
    return sorted(ref.step for ref in trainer.keeper.folder.checkpoints())


def behind_training(world: World, folder: Path) -> dict[str, Any]:
    """Saved at step 7 and trained on while one rank writes late; then the process is lost and goes on from there."""
    found: dict[str, Any] = {}
    for key in STAGES:
        trainer = start(world, folder, f"plain-{key}", **sections(key))
        trainer.train()
        whole = digest(trainer)
        finish(trainer)
        trainer = start(world, folder, f"behind-{key}", checkpoint=BEHIND, **sections(key))
        advance(trainer, SAVED)
        with held(world) as others:
            plain = saved_twice(trainer, folder / f"{ASIDE}-{key}")
            advance(trainer, SAVED + 2)
            others.set()
            if world.rank < world.size - 1:
                written(trainer)
            advance(trainer, SAVED + 3)
            before = steps_of(trainer), trainer.keeper.pending, trainer.keeper.ended
        written(trainer)
        advance(trainer, SAVED + 4)
        after = steps_of(trainer), trainer.keeper.pending
        behind = Manifest.read(trainer.keeper.folder.checkpoints()[0].path)
        finish(trainer)
        trainer = start(world, folder, f"behind-{key}", checkpoint=BEHIND, **sections(key))
        begun = trainer.state.step
        advance(trainer, END)
        found[key] = {"before": world.gather_objects(before), "after": after, "begun": begun,
                      "files": len(behind.files), "equal": behind == plain, "same": digest(trainer) == whole}
        finish(trainer)
    return found


def saved_twice(trainer: Trainer, aside: Path) -> Manifest:
    """Save in the background, and the very same state once more in a run folder `aside`, waited for."""
    keeper, other = trainer.keeper, RunFolder.create(aside)
    begin = keeper.begin

    def twice(engine: Any, snapshot: checkpoint.Snapshot, **options: Any) -> None:
        begin(engine, snapshot, **options)
        waited.append(checkpoint.begin(engine, other, keeper._lease, snapshot, to_host=False))

    waited: list[checkpoint.Saving] = []
    keeper.begin = twice  # type: ignore[method-assign]
    trainer._save()
    del keeper.begin
    return Manifest.read(waited[0].publish().path)


def behind_what_follows(world: World, folder: Path) -> dict[str, Any]:
    """What comes while a save is on its way waits for it: a request to stop, a save, the end, divergence, a return."""
    found: dict[str, Any] = {}
    for name in ("stop", "save", "end"):
        trainer = start(world, folder, name, checkpoint=BEHIND, **sections("2"))
        advance(trainer, SAVED)
        with held(world, 0.3):
            trainer._save()
            if name == "stop":
                trainer.stop._waiting |= SAVE | STOP
                ended = [trainer.step(), trainer.state.step]
            elif name == "save":
                advance(trainer, SAVED + 1)
                trainer._save()
                ended = [trainer.keeper.pending, steps_of(trainer)]
                trainer.stop._waiting |= SAVE | STOP  # nothing new: the one on its way is still waited for
                trainer.step()
            else:
                ended = [int(trainer.train()), trainer.state.step]
        found[name] = {"ended": ended, "steps": steps_of(trainer), "pending": trainer.keeper.pending}
        finish(trainer)
    trainer = start(world, folder, "diverged", checkpoint=BEHIND, **sections("2") | {"train": {"max_bad_steps": 1}})
    advance(trainer, SAVED)
    with held(world, 0.3), rewind_cases.planted(world, [SAVED], float("nan")), contextlib.suppress(PretrainError):
        trainer._save()
        trainer.step()
    found["diverged"] = {"steps": steps_of(trainer), "pending": trainer.keeper.pending}
    finish(trainer)
    for name, behind in (("return", True), ("return-plain", False)):
        wanted = rewind_cases.sections("2")
        wanted["checkpoint"] = {**wanted["checkpoint"], "async_save": behind}
        with held(world, 0.3), rewind_cases.planted(world, [rewind_cases.SPIKE]):
            trainer = start(world, folder, name, **wanted)
            advance(trainer, rewind_cases.CHECKPOINT)
            pending = trainer.keeper.pending
            found[name] = rewind_cases.outcome(trainer) | {"pending": pending}
    return found


def full_disk(world: World, folder: Path) -> dict[str, Any]:
    """A disk that is full in the middle of the last rank's part: the same error and the same folder either way."""
    found: dict[str, Any] = {}
    write = writing.HashedFile.write

    def full(self: writing.HashedFile, data: Any) -> int:
        if "optim_states" in str(self) and world.rank == world.size - 1 and self._file.tell() > 500:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return write(self, data)

    for name, behind in (("waited", False), ("behind", True)):
        trainer = start(world, folder, name, checkpoint={**BEHIND, "async_save": behind}, **sections("2"))
        advance(trainer, 3)
        trainer._save()
        trainer._settle()
        whole = sum(entry.bytes for entry in Manifest.read(trainer.keeper.folder.checkpoints()[0].path).files.values())
        advance(trainer, SAVED)
        writing.HashedFile.write = full  # type: ignore[method-assign]
        writing.shutil = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=100))  # type: ignore[assignment]
        told = (0, "", -1)
        try:
            trainer._save()
            written(trainer)
            trainer.step()
        except PretrainError as error:
            told = (int(error.code), str(error).replace(str(trainer.keeper.folder.root), "RUN"), trainer.state.step)
        finally:
            writing.HashedFile.write = write  # type: ignore[method-assign]
            writing.shutil = shutil
        left = sorted(path.name for path in trainer.keeper.folder.checkpoints_dir.iterdir())
        found[name] = {"told": world.gather_objects(told), "pending": trainer.keeper.pending, "whole": whole,
                       "left": left}
        finish(trainer)
    return found


CASES = {"behind_training": behind_training, "behind_what_follows": behind_what_follows, "full_disk": full_disk}
