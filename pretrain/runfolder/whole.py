"""The newest checkpoint that can be trusted: a damaged one is passed over, and named."""

from __future__ import annotations

import logging

from pretrain.errors import DataCorruption
from pretrain.runfolder.chain import read_chain
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.publish import Manifest

log = logging.getLogger(__name__)


def newest_whole(folder: RunFolder) -> CheckpointRef | None:
    """The newest checkpoint that counts and whose every file has the size and SHA-256 of its manifest.

    None where the run has no checkpoint. Each newer one that is passed over gets a line with the file and its fault; it
    stays where it is. Raises DataCorruption where there are checkpoints and none is whole: a run that has lost its work
    is for a person to judge, not to be started afresh.
    """
    found = _named(folder)
    faults = []
    for ref in found:
        fault = _fault(ref)
        if fault is None:
            return ref
        faults.append(fault)
        log.warning("checkpoint %s is passed over: %s", ref.path.name, fault)
    if found:
        raise DataCorruption(f"{folder.checkpoints_dir}: none of {len(found)} checkpoints is whole (the newest: "
                             f"{faults[0]}); bring one back from a backup, or give the run another name")
    return None


def _named(folder: RunFolder) -> list[CheckpointRef]:
    """Every checkpoint that counts, newest first, with those whose manifest is lost: none is ever published without."""
    try:
        every = [ref for path in folder.checkpoints_dir.iterdir() if (ref := CheckpointRef.parse(path)) is not None]
    except FileNotFoundError:
        return []
    chain = read_chain(folder.lease_dir, (ref.fence for ref in every))
    return sorted((ref for ref in every if chain.counts(ref.fence, ref.step)),
                  key=lambda ref: (ref.fence, ref.step), reverse=True)


def _fault(ref: CheckpointRef) -> str | None:
    try:
        return next(iter(Manifest.read(ref.path).verify(ref.path)), None)
    except (DataCorruption, OSError) as error:
        return str(error)
