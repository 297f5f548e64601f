"""Ranks: how they find each other, agree, and leave.

Rendezvous is our own TCP store, so that a world that does not assemble names who is missing before any model is built.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.engine.preflight import Peer, first_collective, introduce
from pretrain.engine.ranks import LISTEN_FD, RankEnvironment, expand_nodes, node_name
from pretrain.engine.traps import quiet, skip_op_probing
from pretrain.errors import ExitCode, PretrainError, UserError

T = TypeVar("T")
_FAILURE = "failure"
_STORE_TIMEOUT = datetime.timedelta(seconds=10)
_RECORD_WAIT_S = 2.0
_log = logging.getLogger("pretrain")


@dataclass(frozen=True, slots=True)
class World:
    """A joined world. `control` carries small host-side agreements and never touches the accelerator."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: Any
    store: dist.Store
    """Rank 0's; works without the others' help, so that a failing rank can still say why."""
    peers: tuple[Peer, ...] = ()
    """Every rank as it introduced itself, in rank order."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def reduce_ints(self, values: list[int], op: str = "sum") -> list[int]:
        """Element-wise sum or max over ranks of host integers. Collective."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.control)
        return [int(v) for v in tensor]

    def add_up(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks of host numbers, exact for whole ones below 2^53. Collective."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(v) for v in tensor]

    def agree(self, flag: bool) -> bool:
        """True where the flag is true on every rank. Collective."""
        return self.reduce_ints([int(not flag)], "max")[0] == 0

    def barrier(self) -> None:
        """Wait for all ranks, without the accelerator."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank (small plain objects)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its result to all; its error is raised on every rank. Collective.

        Where the error has no meaning for the user, the others get a PretrainError that names rank 0.
        """
        if self.size == 1:
            return action()
        value, failure = _attempt(action) if self.is_main else (None, None)
        told, value = self.broadcast((_told(failure, self.rank), value if failure is None else None))
        if told is not None:
            raise _retold(told, failure)
        return value  # type: ignore[return-value]

    def all_or_none(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if any fails, every rank raises the first failing one's error. Collective."""
        if self.size == 1:
            return action()
        value, failure = _attempt(action)
        for told in self.gather_objects(_told(failure, self.rank)):
            if told is not None:
                raise _retold(told, failure)
        return value  # type: ignore[return-value]

    def first_failure(self, line: str, code: ExitCode) -> Failure | None:
        """Tell the others why this rank fails. Returns what the first of them told; None where rank 0 has gone.

        Not collective, and the answer is the same on all ranks, so that they leave with one code and one line.
        """
        mine = Failure(self.rank, code, line)
        try:
            self.store.set_timeout(_STORE_TIMEOUT)
            return Failure.parse(self.store.compare_set(_FAILURE, "", mine.text))
        except (dist.DistError, RuntimeError):
            return None

    def known_failure(self) -> Failure | None:
        """What a rank that failed told, if one did. Not collective."""
        try:
            self.store.set_timeout(_STORE_TIMEOUT)
            return Failure.parse(self.store.get(_FAILURE)) if self.store.check([_FAILURE]) else None
        except (dist.DistError, RuntimeError):
            return None

    def recorded(self) -> None:
        """Rank 0 has written the verdict down; the others wait a moment for that, as srun may kill it once one ends."""
        deadline = time.monotonic() + _RECORD_WAIT_S
        with contextlib.suppress(dist.DistError, RuntimeError):
            if self.is_main:
                self.store.set("recorded", "")
            while not self.store.check(["recorded"]) and time.monotonic() < deadline:
                time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run fails: the first rank that did, the code of the run, and the line for the user."""

    rank: int
    code: ExitCode
    line: str

    @property
    def text(self) -> str:
        """As it stands in the store."""
        return json.dumps([self.rank, int(self.code), self.line])

    @classmethod
    def parse(cls, text: bytes) -> Failure:
        """The inverse of `text`."""
        rank, code, line = json.loads(text)
        return cls(rank, ExitCode(code), line)


Told = tuple[int, str]
"""An error on its way between ranks: exit code and line."""


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The action's result, or the error it ended with."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None, rank: int) -> Told | None:
    if error is None:
        return None
    if isinstance(error, PretrainError):
        return int(error.code), str(error)
    return int(ExitCode.INTERNAL), f"rank {rank} failed: {type(error).__name__}: {error}"


def _retold(told: Told, own: Exception | None) -> Exception:
    """The error as this rank raises it; `agreed` says that every rank has it, so that one tells the user.

    A rank whose `own` error has no meaning for the user keeps it, for its traceback.
    """
    if own is not None and not isinstance(own, PretrainError):
        return own
    code, line = told
    kind = next((k for k in PretrainError.__subclasses__() if int(k.code) == code), PretrainError)
    error = kind(line)
    error.agreed = True
    return error


def join(own: RankEnvironment, *, timeout_s: float, collective_s: float | None = None, preflight_s: float | None = None,
         force_cpu: bool = False) -> World:
    """Meet the other ranks and start the process groups. Collectives fail after `collective_s` (None: `timeout_s`).

    Raises UserError, the same on every rank that came, naming the ranks that did not come within `timeout_s`, or the
    versions and devices that do not fit together. Where the ranks have met but the first all-reduce takes longer than
    `preflight_s` (None: `timeout_s`), the process ends with code 2 and a line that says who did not get through.
    """
    os.environ.update(RANK=str(own.rank), LOCAL_RANK=str(own.local_rank), WORLD_SIZE=str(own.world_size),
                      MASTER_ADDR=own.master_addr, MASTER_PORT=str(own.master_port))
    cuda = torch.cuda.is_available() and not force_cpu
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    timeout = datetime.timedelta(seconds=collective_s or timeout_s)
    store = _meet(own, timeout_s)
    device = torch.device("cuda", own.local_rank) if cuda else torch.device("cpu")
    peers = introduce(store, own, device, timeout_s)
    if cuda:
        torch.cuda.set_device(device)
    with first_collective(store, own, peers, preflight_s or timeout_s):
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("world", store), rank=own.rank,
                                world_size=own.world_size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
        _add_ones(own, device)
    _start_deepspeed(timeout)
    return World(own.rank, own.local_rank, own.world_size, device, control, store, peers)


def _add_ones(own: RankEnvironment, device: torch.device) -> None:
    """One all-reduce on the device that trains. Raises PretrainError where its sum is wrong."""
    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    if int(one.item()) != own.world_size:
        raise PretrainError(f"rank {own.rank} on {node_name()}: the first all-reduce of ones over {own.world_size} "
                            f"ranks gave {one.item():g}; the devices or the network between them cannot be trusted")


def _meet(own: RankEnvironment, timeout_s: float) -> dist.Store:
    """A store that all ranks have reached."""
    deadline = time.monotonic() + timeout_s
    timeout = datetime.timedelta(seconds=timeout_s)
    fd = os.environ.pop(LISTEN_FD, None)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: dist.Store = dist.TCPStore(own.master_addr, own.master_port, own.world_size, timeout=timeout,
                                          is_master=own.rank == 0 and not hosted, wait_for_workers=False,
                                          master_listen_fd=int(fd) if fd is not None else None)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        if own.rank == 0 and ("in use" in str(error) or "EADDRINUSE" in str(error)):
            raise UserError(f"port {own.master_port} on {own.master_addr} is in use; set launch.port or MASTER_PORT to "
                            "another one") from None
        raise UserError(f"rank {own.rank} on {socket.gethostname()} cannot reach rank 0 at {own.master_addr}:"
                        f"{own.master_port} within {timeout_s:.0f} s") from None
    if hosted:  # torchrun's own store, which outlives a restart of its workers
        store = dist.PrefixStore(f"pretrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"here/{own.rank}", node_name())
    if own.rank == 0:
        missing = set(range(own.world_size))
        while missing and time.monotonic() < deadline:
            missing = {r for r in missing if not store.check([f"here/{r}"])}
            if missing:
                time.sleep(0.05)
        store.set("verdict", _missing(store, own, missing, timeout_s) if missing else "")
    with contextlib.suppress(dist.DistStoreError):
        store.wait(["verdict"], timeout + datetime.timedelta(seconds=10))
    told = store.get("verdict").decode()
    if told:
        if own.rank == 0:
            time.sleep(1.0)  # the store lives in this process: let the others read the verdict
        absent = UserError(told)
        absent.agreed = True
        raise absent
    return store


def _missing(store: dist.Store, own: RankEnvironment, missing: set[int], timeout_s: float) -> str:
    """Who did not come; under srun also the machines from which nobody came."""
    line = (f"{own.world_size - len(missing)} of {own.world_size} ranks came within {timeout_s:.0f} s; missing: rank "
            f"{', '.join(map(str, sorted(missing)))} (launch.timeout)")
    listed = os.environ.get("SLURM_STEP_NODELIST")
    if listed:
        came = {store.get(f"here/{rank}").decode() for rank in range(own.world_size) if rank not in missing}
        empty = [node for node in expand_nodes(listed) if node not in came]
        line += f"; nobody came from {', '.join(empty)}" if empty else ""
    return line


def _start_deepspeed(timeout: datetime.timedelta) -> None:
    import deepspeed
    quiet()
    skip_op_probing()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)


def shutdown(code: int | ExitCode, world: World | None = None) -> None:
    """Leave the process with `code`, together with the other ranks where `world` is given. Does not return.

    Interpreters with live gloo threads abort now and then while they tear down (1 run in 10), so the process leaves
    through `os._exit` once everything is flushed.
    """
    if world is not None and world.size > 1:
        with contextlib.suppress(Exception):
            world.barrier()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(code))
