"""What a start holds of its run folder: the lease, the checkpoint to go on from, what the config says otherwise now."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.config import changes as rules
from pretrain.config.changes import Change
from pretrain.config.load import LoadedConfig, diff_configs, dump_yaml, load_run_config
from pretrain.config.run import RunConfig
from pretrain.data.open import TrainingData, order_fingerprint
from pretrain.engine import checkpoint, readback
from pretrain.engine.build import Engine
from pretrain.engine.distributed import World
from pretrain.errors import DataCorruption, PretrainError, UserError
from pretrain.monitor.environment import describe_environment
from pretrain.runfolder.branch import Lineage, branch_off
from pretrain.runfolder.holder import SlurmJob
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import MANIFEST, hash_file, require_space, write_json_atomic, write_text_atomic
from pretrain.runfolder.retention import remove_dead_pins
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole

_UNSEEN = "other content of the dataset, or another number of ranks where batch.global_batch_size is left out"
_log = logging.getLogger("pretrain")


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """The run to be started is a branch of another one."""

    parent: str
    """Name of that run."""
    at: str | None
    """Step or pointer to branch off at; None: the newest whole checkpoint."""


@dataclass
class Claim:
    """What a process holds of its run folder."""

    folder: RunFolder
    lease: Lease | None
    """Rank 0's."""
    resume: CheckpointRef | None
    changes: Sequence[Change]
    """Where a run that goes on has another config than at its last start, or a branch that begins than its parent."""
    status: Status | None
    """Rank 0's."""
    lineage: Lineage | None = None
    """Of a branch."""

    @property
    def begins_branch(self) -> bool:
        """Whether this start begins a branch: what it goes on from is its parent's work, not yet its own."""
        return self.resume is not None and self.lineage is not None and self.lineage.is_at(self.resume)


def claim_run(loaded: LoadedConfig, world: World, branch: BranchRequest | None = None, *,
              taken: Callable[[Claim], None] = lambda _claim: None) -> Claim:
    """Take the lease and choose the checkpoint to go on from; a branch that is not there yet is made. Collective.

    What an earlier start left stays as it is until `take_over`. The checkpoint is the newest whose files are what its
    manifest says. `taken` gets rank 0's claim as soon as there is a lease to give back: choosing takes minutes, in
    which the process may be told to leave. Raises UserError where another process holds the run or the folder cannot
    be written to, DataCorruption where there are checkpoints and none is whole.
    """
    root = Path(loaded.config.runs_dir) / loaded.config.name
    claim = Claim(RunFolder(root), None, None, [], None)

    def choose() -> tuple[CheckpointRef | None, list[Change], Lineage | None]:
        if branch is not None:
            branch_off(root.with_name(branch.parent), root, branch.at)
        folder = RunFolder.create(root)
        lineage = Lineage.read(folder)
        before = Status.read(folder)
        lease = claim.lease = Lease.acquire(folder, slurm=SlurmJob.from_environment(os.environ))
        claim.status = Status(fence=lease.fence, started=time.time(), restarts=lease.fence - 1)
        taken(claim)
        folder.clean_temporaries(lease.fence)
        remove_dead_pins(folder)
        try:
            with lease.beating():  # hashing a large checkpoint takes minutes
                resume = newest_whole(folder) if loaded.config.train.resume == "auto" else None
        except DataCorruption as error:
            claim.lease = None
            claim.status.ended(error.code, "no whole checkpoint", str(error)).write(folder)
            lease.release()
            raise
        if not folder.checkpoints():
            _describe(folder, loaded)
        if resume is not None:
            claim.status = replace(claim.status, step=resume.step, k=before.k if before else 0)
        claim.status = claim.status.write(folder)
        if resume is None:
            return None, [], lineage
        begins = lineage is not None and lineage.is_at(resume)
        return resume, _changes(folder.parent_config_file if begins else folder.config_file, loaded), lineage

    def guarded() -> tuple[CheckpointRef | None, list[Change], Lineage | None]:
        with _usable(root):
            return choose()

    claim.resume, claim.changes, claim.lineage = world.on_main(guarded)
    return claim


def take_over(loaded: LoadedConfig, claim: Claim, engine: Engine, total_steps: int) -> None:
    """From here on this start is what the run is: nothing stands against training any more. Rank 0 only.

    A start that is refused before this point hides no earlier work and overwrites no config. Raises UserError where the
    disk has no room for a checkpoint, or refuses a write.
    """
    with _usable(claim.folder.root):
        _take_over(loaded, claim, engine, total_steps)


@contextlib.contextmanager
def _usable(root: Path) -> Iterator[None]:
    """A disk that fails ends in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{root}: cannot be used as run folder ({error.strerror}: {error.filename}); make room, make "
                        "it writable, or choose another runs_dir") from error


def _take_over(loaded: LoadedConfig, claim: Claim, engine: Engine, total_steps: int) -> None:
    assert claim.lease is not None and claim.status is not None
    require_space(claim.folder.checkpoints_dir, checkpoint.expected_bytes(engine))
    if claim.resume is None:
        claim.lease.set_fresh()
    else:
        claim.lease.set_resumed_from(claim.resume.step, claim.resume.fence, hash_file(claim.resume.path / MANIFEST))
    _describe(claim.folder, loaded)
    write_json_atomic(claim.folder.root / "deepspeed.json", engine.config)
    for line in readback.differences(engine):
        _log.warning("DeepSpeed differs: %s", line)
    claim.status = replace(claim.status, total_steps=total_steps).write(claim.folder)


def _describe(folder: RunFolder, loaded: LoadedConfig) -> None:
    write_text_atomic(folder.config_file, dump_yaml(loaded))
    write_json_atomic(folder.environment_file, describe_environment())


def _changes(before: Path, loaded: LoadedConfig) -> list[Change]:
    try:
        return diff_configs(load_run_config(before), loaded)
    except PretrainError as error:
        _log.warning("%s; what has changed since the last start cannot be told", error)
        return []


def check_changes(claim: Claim, config: RunConfig) -> None:
    """Say what is configured otherwise than at the last start, and what follows from it.

    Raises UserError where the run cannot go on with that. Weights would not always show it: buffers come out of the
    checkpoint, whatever the config says of them by now.
    """
    if claim.resume is None:
        return
    refused = rules.refused(claim.changes, config, branch=claim.begins_branch)
    if refused:
        raise UserError(f"{claim.resume.path}: {rules.refusal(refused)}")
    if claim.lease is None:
        return
    if claim.lineage is not None:
        _log.info("a branch of %s, begun at step %d", claim.lineage.parent, claim.lineage.step)
    if claim.changes:
        _log.info("changed since the last start: %s", rules.told(claim.changes))
    for line in rules.consequences(claim.changes, config, branch=claim.begins_branch):
        _log.warning("%s", line)


def check_data(claim: Claim, config: RunConfig, data: TrainingData) -> int | None:
    """The batch from which to go on: that of the checkpoint; None without one.

    What decides a batch is not all in the config: files change, and defaults depend on the number of ranks. Raises
    UserError where the checkpoint was trained on other data. A branch may begin on other data: then with their first
    batch, and where only the batch size is another, right after the samples that its parent has seen.
    """
    if claim.resume is None:
        return None
    stored = checkpoint.stored(claim.resume)
    k = int(stored["state"]["k"])
    if stored["data_fingerprint"] == data.fingerprint:
        return k
    order = [change for change in claim.changes if rules.rule_of(change[0], config) is rules.ORDER]
    if not claim.begins_branch:
        raise UserError(f"{claim.resume.path}: the config is of {rules.ORDER.says} ({rules.told(order) or _UNSEEN}); "
                        f"{rules.cure_of(rules.ORDER)}")
    old = next((before for key, before, _ in order if key == "batch.global_batch_size" and before), None)
    if old is not None and order_fingerprint(data.source, config, old) == stored["data_fingerprint"]:
        new = data.order.global_batch_size
        if claim.lease is not None:
            _log.warning("batch size: %d samples in the parent, %d here; the order goes on after sample %d", old, new,
                         k * old - 1)
        return -(-k * old // new)
    if claim.lease is not None:
        _log.warning("the branch begins on other data (%s): with their first batch", rules.told(order) or _UNSEEN)
    return 0
