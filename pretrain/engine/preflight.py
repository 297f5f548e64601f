"""Before any model is built: who is here, on which device, with which versions, and whether the ranks reach each other.

Everything but the first all-reduce goes through rank 0's store, which all ranks have reached by then: where the network
between two other machines is broken, the store can still say so.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import NoReturn

import torch
import torch.distributed as dist

from pretrain.engine.ranks import RankEnvironment, node_name
from pretrain.errors import ExitCode, UserError

_EQUAL = ("pretrain", "torch", "deepspeed", "transformers", "numpy", "safetensors")
"""Packages of which all ranks must have one version."""
_ROW = "preflight/row/{}"
_BEGAN, _PASSED, _TOLD = "preflight/began/{}", "preflight/passed/{}", "preflight/told"
_READ_S = 2.0
"""Seconds for which rank 0, whose process holds the store, lets the others read why the start ends."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank as it introduces itself."""

    rank: int
    local_rank: int
    node: str
    pid: int
    device: str
    """Name of what it trains on."""
    device_id: str
    """What tells two devices of one machine apart; empty for the CPU."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def current(cls, own: RankEnvironment, device: torch.device) -> Peer:
        """This process. Raises UserError where it has no device of its own."""
        versions = {"python": platform.python_version()}
        for name in _EQUAL:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        if device.type != "cuda":
            return cls(own.rank, own.local_rank, node_name(), os.getpid(), "cpu", "", versions)
        found = torch.cuda.device_count()
        if device.index >= found:
            raise UserError(f"rank {own.rank} on {node_name()}: needs GPU {device.index}, and {found} can be seen; as "
                            "many ranks as GPUs on a machine would be right (slurm.gpus_per_node, launch.nproc)")
        facts = torch.cuda.get_device_properties(device)
        versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        return cls(own.rank, own.local_rank, node_name(), os.getpid(), facts.name, str(facts.uuid), versions)


def introduce(store: dist.Store, own: RankEnvironment, device: torch.device, timeout_s: float) -> tuple[Peer, ...]:
    """Every rank's row, in rank order, on every rank. Raises UserError, the same on all, where they do not fit."""
    mine: Peer | str
    try:
        mine = Peer.current(own, device)
    except UserError as error:
        mine = str(error)
    store.set(_ROW.format(own.rank), json.dumps(mine if isinstance(mine, str) else asdict(mine)))
    keys = [_ROW.format(rank) for rank in range(own.world_size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except dist.DistStoreError:
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise UserError(f"rank {_span(silent)} came and then said nothing for {timeout_s:.0f} s "
                        "(launch.timeout)") from None
    rows = [json.loads(store.get(key)) for key in keys]
    refused = next((row for row in rows if isinstance(row, str)), None)
    peers = () if refused else tuple(Peer(**row) for row in rows)
    problem = refused or misfit(peers)
    if problem:
        _let_read(own)
        told = UserError(problem)
        told.agreed = True
        raise told
    return peers


def misfit(peers: Sequence[Peer]) -> str | None:
    """Why these ranks cannot train together, None where they can. Pure."""
    for name in ("python", *_EQUAL, "cuda", "nccl"):
        found: dict[str, list[Peer]] = {}
        for peer in peers:
            found.setdefault(peer.versions.get(name, "none"), []).append(peer)
        if len(found) > 1:
            told = ", ".join(f"{version} on {_who(having)}" for version, having in found.items())
            return f"{name} differs between ranks: {told}; all machines must use one environment"
    seen: dict[tuple[str, str], Peer] = {}
    for peer in peers:
        if peer.device_id:
            other = seen.setdefault((peer.node, peer.device_id), peer)
            if other is not peer:
                return (f"ranks {other.rank} and {peer.rank} both use GPU {peer.device_id} of {peer.node}; one rank a "
                        "GPU would be right")
    return None


def rank_table(peers: Sequence[Peer]) -> list[str]:
    """A line a machine, then the versions that all have. Pure."""
    nodes: dict[str, list[Peer]] = {}
    for peer in peers:
        nodes.setdefault(peer.node, []).append(peer)
    lines = []
    for node, there in nodes.items():
        devices: dict[str, int] = {}
        for peer in there:
            devices[peer.device] = devices.get(peer.device, 0) + 1
        kinds = ", ".join(f"{count} x {name}" for name, count in devices.items())
        lines.append(f"{node}: rank {_span([peer.rank for peer in there])}, {kinds}")
    if peers:
        lines.append(", ".join(f"{name} {version}" for name, version in peers[0].versions.items()))
    return lines


def _who(peers: Sequence[Peer]) -> str:
    nodes = list(dict.fromkeys(peer.node for peer in peers))
    shown = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
    return f"rank {_span([peer.rank for peer in peers])} ({shown})"


def _span(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextlib.contextmanager
def first_collective(store: dist.Store, own: RankEnvironment, peers: Sequence[Peer], limit_s: float) -> Iterator[None]:
    """The body lets all ranks reach each other for the first time. Where that takes longer than `limit_s`, the process
    ends with code 2 and a line that names the ranks that did not begin, or those that did not get through.

    A timer, because a collective that hangs may sit outside of Python; on a connection of its own, because the body may
    hold the one of `store`.
    """
    aside = store.clone()
    store.set(_BEGAN.format(own.rank), "")
    timer = threading.Timer(limit_s, _too_long, (aside, own, peers, limit_s))
    timer.daemon = True
    timer.start()
    try:
        yield
        store.set(_PASSED.format(own.rank), "")
    except RuntimeError:
        if _told(aside):  # the others have left for that reason; this is how it looks from here
            _leave(own)
        raise
    finally:
        timer.cancel()


def _too_long(store: dist.Store, own: RankEnvironment, peers: Sequence[Peer], limit_s: float) -> None:
    with contextlib.suppress(dist.DistError, RuntimeError):
        began = {peer.rank for peer in peers if store.check([_BEGAN.format(peer.rank)])}
        passed = {peer.rank for peer in peers if store.check([_PASSED.format(peer.rank)])}
        line = slow_line(peers, began, passed, limit_s)
        if store.compare_set(_TOLD, "", str(own.rank)) == str(own.rank).encode():
            print(f"error: {line}", file=sys.stderr, flush=True)
    _leave(own)


def _told(store: dist.Store) -> bool:
    try:
        return bool(store.check([_TOLD]))
    except (dist.DistError, RuntimeError):
        return False


def _leave(own: RankEnvironment) -> NoReturn:
    _let_read(own)
    os._exit(int(ExitCode.USER))


def slow_line(peers: Sequence[Peer], began: set[int], passed: set[int], limit_s: float) -> str:
    """Who held up the first all-reduce. Pure."""
    head = f"the first all-reduce of {len(peers)} ranks did not end within {limit_s:.0f} s (launch.preflight): "
    absent = [peer for peer in peers if peer.rank not in began]
    if absent:
        return f"{head}{_who(absent)} did not come to it"
    left = [peer for peer in peers if peer.rank not in passed]
    return (f"{head}all began it, {_who(left)} did not get through; is the network between the machines open, and the "
            "right interface chosen (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?")


def _let_read(own: RankEnvironment) -> None:
    if own.rank == 0 and own.world_size > 1:
        time.sleep(_READ_S)
