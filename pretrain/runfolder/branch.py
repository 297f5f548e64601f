"""A branch: another run, in a folder of its own, that begins at a checkpoint of this one.

    runs/NAME/  branch.json             which run, step, fence and manifest it began from
                parent.yaml             config of that run at the time
                checkpoints/step-N.fF/  the very files of the parent, as hard links where the filesystem allows
                lease/  metrics.jsonl   who wrote what, and the record up to step N: rows of later steps do not count

The parent may train meanwhile: its lease is not asked for, the checkpoint is pinned while it is taken over. Files of a
checkpoint never change, and each run removes its own links only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.backup import copy_file, copy_records
from pretrain.runfolder.layout import LATEST, CheckpointRef, RunFolder
from pretrain.runfolder.publish import MANIFEST, Manifest, hash_file, publish_dir, require_space, write_json_atomic
from pretrain.runfolder.retention import pinned

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lineage:
    """`branch.json`: where a branch began."""

    parent: str
    """Run folder of the parent, as it was named."""
    step: int
    k: int
    fence: int
    manifest_sha256: str
    asked: str | None
    """The step or pointer that was asked for; None: the newest whole checkpoint."""
    created: float
    """Unix time."""

    @classmethod
    def read(cls, folder: RunFolder) -> Lineage | None:
        """The lineage of a run; None where it is no branch. Raises DataCorruption."""
        try:
            return cls(**json.loads(folder.lineage_file.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataCorruption(f"{folder.lineage_file}: cannot be read ({error})") from error

    def is_at(self, ref: CheckpointRef) -> bool:
        """Whether `ref` is the checkpoint that the branch began with."""
        return (ref.step, ref.fence) == (self.step, self.fence)


def branch_off(parent_root: Path, root: Path, asked: str | None) -> Lineage:
    """Make the branch `root` of the run `parent_root`, or find that it is there already.

    `asked`: step of the checkpoint, or the name of a pointer (`best-METRIC`); None: the newest whole one. The branch
    appears with one rename, after every file in it was held to the manifest. Raises UserError where the parent has no
    such checkpoint, or `root` is something else than this very branch; DataCorruption where the checkpoint that was
    asked for, or every one there is, is damaged.
    """
    parent, target = RunFolder.open(parent_root), RunFolder(root)
    if parent.root.resolve() == root.resolve():
        raise UserError(f"{root}: a branch needs another name than its parent")
    if not root.exists() or {path.name for path in root.iterdir()} <= {target.slurm_dir.name}:
        _remove_leftovers(root)
        lineage = _create(parent, root, asked)
        if lineage is not None:
            return lineage
    found = Lineage.read(target)
    if found is None or Path(found.parent).name != parent.root.resolve().name:
        what = f"is a branch of {found.parent}" if found is not None else "exists and is no branch"
        raise UserError(f"{root}: {what}, not one of {parent_root}; choose another name")
    if asked is not None and asked not in (str(found.step), found.asked):
        raise UserError(f"{root}: began at step {found.step} of {found.parent}, not at {asked}; choose another name, "
                        "or leave --from-step out to go on with it")
    return found


def _create(parent: RunFolder, root: Path, asked: str | None) -> Lineage | None:
    """Make the branch; None where another process was first."""
    temporary = root.with_name(f".branch-{root.name}-{socket.gethostname()}-{os.getpid()}")
    branch = RunFolder(temporary)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        branch.checkpoints_dir.mkdir(parents=True)
        ref = _take(parent, branch, asked)
        copy_records(parent, branch)
        shutil.copyfile(parent.config_file, branch.parent_config_file)
        lineage = Lineage(str(parent.root), ref.step, Manifest.read(ref.path).k, ref.fence,
                          hash_file(ref.path / MANIFEST), asked, time.time())
        write_json_atomic(branch.lineage_file, asdict(lineage))
        branch.write_pointer(LATEST, ref)
        if root.exists():  # the ranks have met in there
            if RunFolder(root).slurm_dir.exists():
                os.rename(RunFolder(root).slurm_dir, branch.slurm_dir)
            root.rmdir()
        publish_dir(temporary, root)
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(f"{root}: a branch cannot be made here ({error.strerror}: {error.filename})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("branch %s begins at %s", root, parent.final_checkpoint(ref.step, ref.fence).path)
    return lineage


def _take(parent: RunFolder, branch: RunFolder, asked: str | None) -> CheckpointRef:
    """Take over the first candidate that is whole. Where one was asked for, no other takes its place."""
    faults: list[str] = []
    for ref in _candidates(parent, asked):
        copy = branch.final_checkpoint(ref.step, ref.fence)
        try:
            with pinned(ref):
                _link(ref.path, copy.path)
            problems = Manifest.read(copy.path).verify(copy.path)
        except (DataCorruption, FileNotFoundError) as error:  # damaged, or removed by its run this moment
            problems = [str(error)]
        if not problems:
            return copy
        shutil.rmtree(copy.path, ignore_errors=True)
        faults.append(problems[0])
        log.warning("checkpoint %s is passed over: %s", ref.path.name, problems[0])
    raise DataCorruption(f"{parent.root}: no checkpoint to branch off from is whole ({faults[0]})")


def _candidates(parent: RunFolder, asked: str | None) -> Iterator[CheckpointRef]:
    """Checkpoints to branch off from, the best choice first. Raises UserError where there is none."""
    known = parent.checkpoints()
    if not known:
        raise UserError(f"{parent.root}: has no checkpoint to branch off from yet")
    if asked is None:
        yield from known
    elif asked.isdigit():
        found = [ref for ref in known if ref.step == int(asked)]
        if not found:
            there = ", ".join(str(step) for step in sorted({ref.step for ref in known}))
            raise UserError(f"{parent.root}: has no checkpoint of step {asked}; there are {there}")
        yield found[0]
    else:
        best = parent.read_pointer(asked) if asked.startswith("best-") else None
        if best is None:
            there = ", ".join(sorted(path.name for path in parent.checkpoints_dir.glob("best-*"))) or "none"
            raise UserError(f'{parent.root}: "{asked}" is neither a step nor a best-METRIC of it; of these there are: '
                            f"{there}")
        yield best


def _link(source: Path, target: Path) -> None:
    """The files of a checkpoint under another folder: hard links, or copies where the filesystem has none."""
    manifest = Manifest.read(source)
    copied = 0
    for name in [*manifest.files, MANIFEST]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except FileNotFoundError:
            raise
        except OSError:
            if not copied:
                require_space(target.parent, sum(entry.bytes for entry in manifest.files.values()))
            copy_file(source / name, target / name)
            copied += 1
    if copied:
        log.info("%s: %d files were copied, as hard links are not possible here", target.name, copied)


def _remove_leftovers(root: Path) -> None:
    """Remove what processes of this machine that are gone left of this branch."""
    start = f".branch-{root.name}-{socket.gethostname()}-"
    for path in root.parent.glob(".branch-*"):
        pid = path.name.removeprefix(start)
        if path.name.startswith(start) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
