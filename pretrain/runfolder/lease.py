"""One writer at a time: a lease on the run folder, with a fence number that rises by one with each holder.

A fence is claimed by renaming a finished folder to `lease/FENCE/`, which the filesystem lets exactly one process do:
unlike a bare mkdir it never leaves a claim without the name of its holder, whatever is killed in between. The holder
touches `lease/FENCE/heartbeat`; its age is measured against a file touched on the same filesystem, so clocks of
different machines do not matter. Fences are never removed: they are the chain that readers follow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pretrain.errors import UserError
from pretrain.runfolder.holder import FRESH, Holder, ProcessId, ResumedFrom, SlurmJob, fences
from pretrain.runfolder.layout import CLAIM, PROBE, RunFolder
from pretrain.runfolder.publish import fsync

log = logging.getLogger(__name__)
LEASE_TIMEOUT = 120.0
"""Seconds without a heartbeat after which a holder on another machine is taken for dead."""
_HEARTBEAT = "heartbeat"


class Lease:
    """The right to write to a run folder, as long as `still_held()`."""

    def __init__(self, folder: RunFolder, holder: Holder) -> None:
        self._folder = folder
        self._holder = holder
        self._path = folder.lease_dir / str(holder.fence)

    @property
    def fence(self) -> int:
        """Number that everything written under this lease carries."""
        return self._holder.fence

    @property
    def holder(self) -> Holder:
        """What `holder.json` says."""
        return self._holder

    @classmethod
    def acquire(cls, folder: RunFolder, *, resumed_from: ResumedFrom | None = None,
                lease_timeout: float = LEASE_TIMEOUT, slurm: SlurmJob | None = None) -> Lease:
        """Claim the next fence. `resumed_from` may follow later with `set_resumed_from` or `set_fresh`.

        Raises UserError that names the live holder, or the reason why the folder cannot be written to. Where the last
        holder is silent but not known to be dead, watches its heartbeat for a quarter of `lease_timeout` (seconds)
        before taking over, so that a jump of the clock does not unseat a live run.
        """
        process = ProcessId.current()
        try:
            while True:
                last = _newest(folder)
                _refuse_if_held(folder, last, lease_timeout, slurm)
                holder = Holder(last + 1, process, slurm, time.time(), resumed_from)
                if _claim(folder.lease_dir, holder):
                    log.info("lease %d on %s", holder.fence, folder.root)
                    return cls(folder, holder)
        except OSError as error:
            raise UserError(f"{folder.lease_dir}: cannot claim the run folder ({error.strerror}: {error.filename}); "
                            "make it writable or choose another runs_dir") from error

    def heartbeat(self) -> None:
        """Say that the holder lives: one touch. Harmless where the lease has been removed by hand."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path / _HEARTBEAT)

    @contextlib.contextmanager
    def beating(self, every: float = LEASE_TIMEOUT / 8) -> Iterator[None]:
        """Touch the heartbeat every so many seconds from a thread, through long saves and evaluations."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(every):
                try:
                    self.heartbeat()
                except OSError as error:
                    log.warning("%s: heartbeat failed (%s)", self._path, error)

        thread = threading.Thread(target=beat, name="lease-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def still_held(self) -> bool:
        """False once another process has claimed a higher fence, or someone removed this one. Asked before each
        publication; whoever gets False stops without writing anything more.
        """
        claimed = fences(self._folder.lease_dir)
        return bool(claimed) and claimed[-1] == self.fence

    def set_resumed_from(self, step: int, fence: int, manifest_sha: str) -> None:
        """Record the checkpoint from which this holder goes on, before it writes anything: what later steps of older
        holders left behind no longer counts from now on.
        """
        self._rewrite(replace(self._holder, resumed_from={"step": step, "fence": fence, "manifest_sha": manifest_sha}))

    def set_fresh(self) -> None:
        """Record that this holder starts from nothing: no older work in the folder counts from now on."""
        self._rewrite(replace(self._holder, resumed_from=FRESH))

    def release(self) -> None:
        """Give the lease back, so that the next start need not ask whether this process is dead."""
        self._rewrite(replace(self._holder, released=time.time()))

    def _rewrite(self, holder: Holder) -> None:
        holder.write(self._path)
        self._holder = holder


def live_holder(folder: RunFolder, lease_timeout: float = LEASE_TIMEOUT) -> Holder | None:
    """The process that holds the run now, as far as can be told from here; changes nothing."""
    claimed = fences(folder.lease_dir)
    holder = Holder.read(folder.lease_dir / str(claimed[-1])) if claimed else None
    if holder is None or holder.released is not None or holder.process.gone():
        return None
    return None if _silent(folder.lease_dir, holder.fence, lease_timeout) else holder


def _newest(folder: RunFolder) -> int:
    """The highest fence ever used here; checkpoints count too, in case someone removed the leases."""
    return max([0, *fences(folder.lease_dir), *(ref.fence for ref in folder.published())])


def _refuse_if_held(folder: RunFolder, fence: int, lease_timeout: float, slurm: SlurmJob | None) -> None:
    """Raise UserError unless the holder of `fence` is released, stale, or was never recorded."""
    holder = Holder.read(folder.lease_dir / str(fence))
    if holder is None or holder.released is not None or holder.process.gone():
        return
    if slurm and holder.slurm and slurm.job == holder.slurm.job and slurm.restart > holder.slurm.restart:
        return
    if _silent(folder.lease_dir, fence, lease_timeout):
        before = _beat(folder.lease_dir, fence)
        time.sleep(lease_timeout / 4)
        if _beat(folder.lease_dir, fence) == before:
            log.warning("%s: %s has been silent for more than %.0f s; taking over", folder.root, _who(holder),
                        lease_timeout)
            return
    raise UserError(f"{folder.root}: is held by {_who(holder)}; stop it with `pretrain control {folder.root} stop` or "
                    f"give this run another name (a dead holder is passed over after {lease_timeout:.0f} s of silence)")


def _who(holder: Holder) -> str:
    since = datetime.fromtimestamp(holder.since).isoformat(sep=" ", timespec="seconds")
    return f"process {holder.process.pid} on {holder.process.host} since {since}"


def _beat(lease_dir: Path, fence: int) -> float:
    """Time of the last heartbeat, by the clock of the filesystem; 0 where there is none."""
    try:
        return (lease_dir / str(fence) / _HEARTBEAT).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _silent(lease_dir: Path, fence: int, lease_timeout: float) -> bool:
    """Whether the last heartbeat is further from now than `lease_timeout`, in either direction of a jumping clock."""
    probe = lease_dir / f"{PROBE}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:  # a reader of someone else's run
        now = time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return abs(now - _beat(lease_dir, fence)) > lease_timeout


def _claim(lease_dir: Path, holder: Holder) -> bool:
    """Try to become the holder of a fence; False where another process was first."""
    claim = lease_dir / f"{CLAIM}{os.getpid()}-{os.urandom(4).hex()}"
    final = lease_dir / str(holder.fence)
    try:
        claim.mkdir()
        (claim / _HEARTBEAT).touch()
        holder.write(claim)
        os.rename(claim, final)
    except OSError:
        shutil.rmtree(claim, ignore_errors=True)
        if final.exists():
            # A network filesystem may report a rename as failed that it carried out.
            return Holder.read(final) == holder
        raise
    fsync(lease_dir)
    return True
