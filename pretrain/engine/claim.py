"""What a start holds of its run folder: the lease, the checkpoint to go on from, what the config says otherwise now."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.config import changes as rules
from pretrain.config.changes import Change
from pretrain.config.load import LoadedConfig, diff_configs, dump_yaml, load_run_config
from pretrain.config.run import RunConfig
from pretrain.engine import checkpoint, readback
from pretrain.engine.build import Engine
from pretrain.engine.distributed import World
from pretrain.errors import DataCorruption, PretrainError, UserError
from pretrain.monitor.environment import describe_environment
from pretrain.runfolder.holder import SlurmJob
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import MANIFEST, hash_file, require_space, write_json_atomic, write_text_atomic
from pretrain.runfolder.retention import remove_dead_pins
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole

_UNSEEN = "other content of the dataset, or another number of ranks where batch.global_batch_size is left out"
_log = logging.getLogger("pretrain")


@dataclass
class Claim:
    """What a process holds of its run folder."""

    folder: RunFolder
    lease: Lease | None
    """Rank 0's."""
    resume: CheckpointRef | None
    changes: Sequence[Change]
    """Where a run that goes on has another config than at its last start."""
    status: Status | None
    """Rank 0's."""


def claim_run(loaded: LoadedConfig, world: World) -> Claim:
    """Take the lease and choose the checkpoint to go on from. Collective.

    What an earlier start left stays as it is until `take_over`. The checkpoint is the newest whose files are what its
    manifest says. Raises UserError where another process holds the run or the folder cannot be written to,
    DataCorruption where there are checkpoints and none is whole.
    """
    root = Path(loaded.config.runs_dir) / loaded.config.name
    lease: Lease | None = None
    status: Status | None = None

    def claim() -> tuple[CheckpointRef | None, list[Change]]:
        nonlocal lease, status
        folder = RunFolder.create(root)
        before = Status.read(folder)
        lease = Lease.acquire(folder, slurm=SlurmJob.from_environment(os.environ))
        folder.clean_temporaries(lease.fence)
        remove_dead_pins(folder)
        status = Status(fence=lease.fence, started=time.time(), restarts=lease.fence - 1)
        try:
            with lease.beating():  # hashing a large checkpoint takes minutes
                resume = newest_whole(folder) if loaded.config.train.resume == "auto" else None
        except DataCorruption as error:
            status.ended(error.code, "no whole checkpoint", str(error)).write(folder)
            lease.release()
            raise
        if not folder.checkpoints():
            _describe(folder, loaded)
        if resume is not None:
            status = replace(status, step=resume.step, k=before.k if before else 0)
        status = status.write(folder)
        return resume, _changes(folder, loaded) if resume else []

    resume, changes = world.on_main(claim)
    return Claim(RunFolder(root), lease, resume, changes, status)


def take_over(loaded: LoadedConfig, claim: Claim, engine: Engine, total_steps: int) -> None:
    """From here on this start is what the run is: nothing stands against training any more. Rank 0 only.

    A start that is refused before this point hides no earlier work and overwrites no config. Raises UserError where the
    disk has no room for a checkpoint.
    """
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


def _changes(folder: RunFolder, loaded: LoadedConfig) -> list[Change]:
    try:
        return diff_configs(load_run_config(folder.config_file), loaded)
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
    refused = rules.refused(claim.changes, config)
    if refused:
        raise UserError(f"{claim.resume.path}: {rules.refusal(refused)}")
    if claim.lease is not None and claim.changes:
        _log.info("changed since the last start: %s", rules.told(claim.changes))
        for line in rules.consequences(claim.changes, config):
            _log.warning("%s", line)


def check_data(claim: Claim, config: RunConfig, fingerprint: str) -> None:
    """Raise UserError where the checkpoint was trained on other data than the config's, whose fingerprint is given.

    What decides a batch is not all in the config: files change, and defaults depend on the number of ranks.
    """
    if claim.resume is None or checkpoint.stored(claim.resume)["data_fingerprint"] == fingerprint:
        return
    order = [change for change in claim.changes if rules.rule_of(change[0], config) is rules.ORDER]
    raise UserError(f"{claim.resume.path}: the config is of {rules.ORDER.says} ({rules.told(order) or _UNSEEN}); "
                    f"{rules.cure_of(rules.ORDER)}")
