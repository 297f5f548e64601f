"""What saving, loading and going on cost: a GPT-2 of 124M parameters, fp32, one process.

- save: ours, from the live engine to a published checkpoint (state taken, written, hashed, flushed, renamed; a forward
  pass for its proof), over `torch.save` of the same state to the same files, each flushed;
- load: ours, from a folder nobody trusts to a proven engine (every file hashed, copied into masters and moments, a
  forward pass), over `torch.load` of the same files, which puts nothing anywhere;
- stall: how long training waits for a save in the background, over one copy of the same tensors by `clone`;
- resume: a new process until its first step, and where that time goes.

Wall seconds in pairs whose order alternates. Files come out of the page cache, or from the disk where that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import Summary, compare, lone_world, wall_seconds, write_results
from pretrain.config.load import LoadedConfig, load_run_config
from pretrain.engine import checkpoint
from pretrain.engine.capture import captured
from pretrain.engine.claim import Claim, claim_run
from pretrain.engine.distributed import World
from pretrain.engine.setup import prepare
from pretrain.engine.trainer import Trainer
from pretrain.engine.writing import TorchFile
from pretrain.runfolder.layout import CheckpointRef
from pretrain.runfolder.publish import Manifest, fsync
from pretrain.runfolder.whole import newest_whole

STAGE = 2
STARTS = 5
SETS = ["data.source={kind: synthetic}", "data.source.vocab_size=30000", "data.source.samples=64", "data.seq_len=64",
        "train.length=1000 steps", "schedule.warmup=null", "engine.precision=fp32", "checkpoint.every=null",
        "batch.global_batch_size=1", "batch.micro_batch_size=1", "eval.every=null", "monitor.tensorboard=false",
        "monitor.progress=off", "monitor.log_every=1000 steps"]


def main() -> None:
    """Measure and keep the results."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = _measured(lone_world(), Path(folder))
    write_results("checkpoint", results)


def _measured(world: World, folder: Path) -> dict[str, Any]:
    loaded = _config(folder)
    claim = claim_run(loaded, world)
    bench = Bench(prepare(loaded, world, claim, [], Console(quiet=True)), claim, folder / "plain")
    results: dict[str, Any] = {"parameters": loaded.config.model.parameter_count().total, "ZeRO stage": STAGE,
                               "sha256, one thread, GB/s": _hash_rate()}
    results |= _against("save over torch.save", bench.save, bench.plain_save)
    results |= _against("stall of a save in the background over clone", bench.stall, bench.clone)
    results |= _against("the same over a save that is waited for", bench.stall, bench.save)
    results |= _against("step beside a save in the background over a step alone", bench.step_beside, bench.step_alone)
    ref = bench.publish(to_host=False)
    results["bytes"] = sum(entry.bytes for entry in Manifest.read(ref.path).files.values())
    for name, cold in (("", False), (", from the disk", True)):
        results |= _against(f"load over torch.load{name}", partial(bench.load, ref, cold=cold),
                            partial(bench.plain_load, ref, cold=cold))
    results |= _against("verification over torch.load", partial(bench.verify, ref), partial(bench.plain_load, ref))
    bench.close()
    starts = [_start(folder) for _ in range(STARTS)]
    return results | {f"resume, {part}": Summary.of([start[part] for start in starts], "s") for part in starts[0]}


def _against(name: str, ours: Callable[[], float], other: Callable[[], float]) -> dict[str, Any]:
    found = compare(ours, other, unit="s")
    print(f"{name}: {found.ours} over {found.other}: {found.ratio}", flush=True)
    return {f"{name}, ours": found.ours, f"{name}, other": found.other, f"{name}, ratio": found.ratio}


def _config(folder: Path) -> LoadedConfig:
    return load_run_config("baseline-124m", [*SETS, f"runs_dir={folder}", f"engine.zero_stage={STAGE}"])


def _hash_rate() -> float:
    data = bytes(1 << 28)
    return len(data) / 1e9 / min(wall_seconds(lambda: hashlib.sha256(data)) for _ in range(5))


class Bench:
    """One engine, and what is done with its state. Each measurement returns wall seconds."""

    def __init__(self, trainer: Trainer, claim: Claim, plain: Path) -> None:
        self._trainer = trainer
        self._claim = claim
        self._plain = plain
        trainer.step()

    def close(self) -> None:
        """Leave a checkpoint to go on from."""
        self._trainer._save(wait=True)
        self._trainer.loader.close()
        self._trainer.keeper.close()
        self._trainer.engine.release()
        assert self._claim.lease is not None
        self._claim.lease.release()

    def publish(self, *, to_host: bool) -> CheckpointRef:
        """A whole save."""
        return self._begin(to_host=to_host).publish()

    def save(self) -> float:
        """A save that training waits for, without the removal of an older one."""
        shutil.rmtree(self._trainer.keeper.folder.final_checkpoint(self._trainer.state.step, self._fence).path,
                      ignore_errors=True)
        return wall_seconds(lambda: self.publish(to_host=False))

    def plain_save(self) -> float:
        """The same state in the same files, by torch alone, flushed."""
        files = self._files(to_host=False)
        shutil.rmtree(self._plain, ignore_errors=True)

        def write() -> None:
            (self._plain / "deepspeed").mkdir(parents=True)
            for file in files:
                torch.save(file.state, self._plain / file.name)
                fsync(self._plain / file.name)
            fsync(self._plain / "deepspeed")

        return wall_seconds(write)

    def stall(self) -> float:
        """Until training may go on; what is written then is waited for, not measured."""
        with self._beside() as seconds:
            return seconds

    def clone(self) -> float:
        """One copy of every tensor that a checkpoint holds, once each."""
        unique = {(t.data_ptr(), t.numel()): t for file in self._files(to_host=False) for t in _tensors(file.state)}
        return wall_seconds(lambda: [tensor.clone() for tensor in unique.values()])

    def step_alone(self) -> float:
        """A step of training."""
        return wall_seconds(self._trainer.step)

    def step_beside(self) -> float:
        """A step while a checkpoint is written in the background."""
        with self._beside():
            return wall_seconds(self._trainer.step)

    def verify(self, ref: CheckpointRef) -> float:
        """Every file against the manifest."""
        return wall_seconds(lambda: _whole(ref))

    def load(self, ref: CheckpointRef, *, cold: bool) -> float:
        """Every file against the manifest, then into the engine."""
        if cold:
            _forget(ref.path)

        def work() -> None:
            _whole(ref)
            checkpoint.load(self._trainer.engine, ref, self._trainer.config.seed)

        return wall_seconds(work)

    def plain_load(self, ref: CheckpointRef, *, cold: bool = False) -> float:
        """The same files by torch alone."""
        if cold:
            _forget(ref.path)
        return wall_seconds(lambda: [torch.load(path, map_location="cpu", weights_only=False)
                                     for path in sorted(ref.path.rglob("*.pt"))])

    @property
    def _fence(self) -> int:
        assert self._claim.lease is not None
        return self._claim.lease.fence

    def _begin(self, *, to_host: bool) -> checkpoint.Saving:
        return checkpoint.begin(self._trainer.engine, self._claim.folder, self._claim.lease, self._trainer.snapshot(),
                                to_host=to_host)

    def _files(self, *, to_host: bool) -> list[TorchFile]:
        files = captured(self._trainer.engine, self._plain, to_host=to_host)
        return [file for file in files if isinstance(file, TorchFile)]

    @contextmanager
    def _beside(self) -> Iterator[float]:
        """A save is being written; gives the seconds until that was so."""
        start = time.perf_counter()
        saving = self._begin(to_host=True)
        try:
            yield time.perf_counter() - start
        finally:
            shutil.rmtree(saving.publish().path)


def _whole(ref: CheckpointRef) -> None:
    assert not Manifest.read(ref.path).verify(ref.path)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for member in state.values() if isinstance(state, dict) else state:
            yield from _tensors(member)


def _forget(folder: Path) -> None:
    """Take the files of a folder, which are on the disk, out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _start(folder: Path) -> dict[str, float]:
    """Seconds of the parts of a start, in a process of its own."""
    command = [sys.executable, "-P", "-m", "benchmarks.checkpoint", str(folder), repr(time.time())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _resumed(folder: Path, started: float) -> None:
    """Go on with the run in `folder` as a rank does, up to its first step; print where the time went."""
    marks = {"interpreter and imports": time.time() - started}
    torch.set_num_threads(1)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        result = work()
        marks[name] = marks.get(name, 0.0) + time.perf_counter() - before
        return result

    loaded = _config(folder)
    world = timed("ranks meet", lone_world)
    verified, restored = newest_whole, checkpoint.load
    import pretrain.engine.claim as claiming
    claiming.newest_whole = lambda folder: timed("files are verified", lambda: verified(folder))  # type: ignore
    checkpoint.load = lambda *given: timed("state is loaded and proven", lambda: restored(*given))  # type: ignore
    before = time.perf_counter()
    claim = claim_run(loaded, world)
    assert claim.resume is not None
    trainer = prepare(loaded, world, claim, [], Console(quiet=True))
    inside = marks["files are verified"] + marks["state is loaded and proven"]
    marks["model, engine, data, records"] = time.perf_counter() - before - inside
    timed("first step", trainer.step)
    print(json.dumps(marks | {"whole": time.time() - started}), flush=True)
    trainer.loader.close()
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _resumed(Path(sys.argv[1]), float(sys.argv[2]))
    main()
