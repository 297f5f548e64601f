"""A training run without torch: ranks of srun on the real run folder, lease, checkpoints, status and stop requests.

What is trained is a vector of whole numbers; its "gradient" at batch k is a sum over the rows of the batch, shared out
to the ranks, so that the result depends on nothing but the number of batches: not on ranks, restarts or faults. Each
rank owns a part of the vector and writes it into checkpoints, as ZeRO does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.interval import Progress
from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.engine.ranks import LISTEN_FD, RankEnvironment, forget_meeting, meet, rank_environment
from pretrain.engine.stopping import SAVE, STOP, StopRequests, StopSignals
from pretrain.errors import ExitCode
from pretrain.monitor.rows import encode
from pretrain.runfolder.holder import SlurmJob
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import Manifest, hash_file, replace_dir, write_json_atomic
from pretrain.runfolder.retention import delete, to_delete
from pretrain.runfolder.status import Status
from pretrain.runfolder.whole import newest_whole

SIZE = 12
PRIME = 2**61 - 1


def gradient(k: int, rows: range) -> list[int]:
    """Sum over rows of batch `k`."""
    total = [0] * SIZE
    for row in rows:
        digest = hashlib.sha512(f"{k}/{row}".encode()).digest()
        for i in range(SIZE):
            total[i] += digest[i]
    return total


def updated(vector: list[int], gradient: list[int]) -> list[int]:
    return [(3 * value + step + 1) % PRIME for value, step in zip(vector, gradient, strict=True)]


def loss_of(vector: list[int]) -> float:
    return sum(vector) / (SIZE * PRIME)


def reference(steps: int, rows: int) -> list[tuple[float, list[int]]]:
    """(loss, vector) after each step of a run that nothing disturbs."""
    vector, found = [0] * SIZE, []
    for k in range(steps):
        vector = updated(vector, gradient(k, range(rows)))
        found.append((loss_of(vector), vector))
    return found


class Lost(Exception):
    """Another rank has gone."""


class World:
    """Rank 0 in the middle; every message is a JSON value."""

    def __init__(self, own: RankEnvironment, timeout_s: float) -> None:
        self.rank, self.size = own.rank, own.world_size
        self._peers: list[socket.socket] = []
        if own.rank == 0 and own.world_size > 1:
            listener = socket.socket(fileno=int(os.environ.pop(LISTEN_FD)))
            listener.settimeout(timeout_s)
            peers = {}
            while len(peers) < own.world_size - 1:
                peer, _ = listener.accept()
                peer.settimeout(timeout_s)
                peers[int(_receive(peer))] = peer
            self._peers = [peers[rank] for rank in sorted(peers)]
        elif own.rank:
            peer = socket.create_connection((own.master_addr, own.master_port), timeout=timeout_s)
            _send(peer, own.rank)
            self._peers = [peer]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank."""
        try:
            if self.rank:
                _send(self._peers[0], value)
                return list(_receive(self._peers[0]))
            found = [value, *(_receive(peer) for peer in self._peers)]
            for peer in self._peers:
                _send(peer, found)
            return found
        except (OSError, struct.error) as error:
            raise Lost(f"rank {self.rank} lost its connection to another rank ({error})") from error


def _send(peer: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    peer.sendall(struct.pack("!I", len(data)) + data)


def _receive(peer: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = peer.recv(count - len(data))
            if not part:
                raise OSError("connection closed")
            data += part
        return data
    return json.loads(exactly(struct.unpack("!I", exactly(4))[0]))


@dataclass
class Run:
    """One start."""

    config: RunConfig
    folder: RunFolder
    world: World
    lease: Lease | None
    status: Status | None
    vector: list[int]
    step: int = 0
    saved: int = -1

    @property
    def total(self) -> int:
        return int(self.config.train.length.amount)

    def rows(self) -> range:
        share = int(self.config.batch.global_batch_size or 0) // self.world.size
        return range(self.world.rank * share, (self.world.rank + 1) * share)

    def train(self, stop: StopRequests) -> ExitCode:
        pause = float(os.environ.get("PAYLOAD_STEP_S", "0.02"))
        while self.step < self.total:
            told = self.world.gather([gradient(self.step, self.rows()), stop.take(), stop.reason])
            if any(request & STOP for _, request, _ in told):
                self.save()
                self.reason = next(reason for *_, reason in told if reason)
                return ExitCode.STOPPED
            if any(request & SAVE for _, request, _ in told):
                self.save()
            self.vector = updated(self.vector, [sum(parts) for parts in zip(*(g for g, *_ in told), strict=True)])
            self.step += 1
            self.log()
            if self.step == int(os.environ.get("PAYLOAD_BREAK_AT", "-1")):
                raise OSError("broken on purpose")
            every = self.config.checkpoint.every
            if every is not None and every.due(Progress(steps=self.step - 1), Progress(steps=self.step)) is not None:
                self.save()
            time.sleep(pause)
        self.save()
        self.reason = "length reached"
        return ExitCode.DONE

    reason = ""

    def log(self) -> None:
        if self.lease is None or self.status is None:
            return
        with open(self.folder.metrics_jsonl, "ab") as file:
            file.write(encode({"step": self.step, "k": self.step, "loss": loss_of(self.vector),
                               "tokens_per_second": 1000.0, "eta_seconds": 60.0}, self.lease.fence))
        if time.time() - self.status.updated > 1.0:
            self.status = replace(self.status, step=self.step, k=self.step).write(self.folder)

    def save(self) -> None:
        """As the engine does it: written aside by all, hashed, described and published by rank 0."""
        if self.step == self.saved:
            return
        world = self.world
        fence = world.gather(self.lease.fence if self.lease is not None else 0)[0]
        aside = self.folder.tmp_checkpoint(self.step, fence)
        if world.rank == 0:
            aside.mkdir(parents=True, exist_ok=True)
        world.gather(None)
        part = -(-SIZE // world.size)
        mine = self.vector[world.rank * part:(world.rank + 1) * part]
        failed = ""
        try:
            write_json_atomic(aside / f"shard-{world.rank}.json", mine)
            if world.rank == 0:
                (aside / "ballast").write_bytes(b"x" * int(os.environ.get("PAYLOAD_BALLAST", "0")))
        except OSError as error:
            failed = f"{error.filename}: {error.strerror}"
        failed = next((told for told in world.gather(failed) if told), "")
        if failed:
            raise OSError(failed)
        if self.lease is not None:
            if not self.lease.still_held():
                if "PAYLOAD_HAUNT" not in os.environ:
                    raise Lost("another process took this run over")
                self.vector = [0] * SIZE  # a dead process that never asks: all that it writes from now on is wrong
            self.publish(aside, fence)
        world.gather(None)
        self.saved = self.step

    def publish(self, aside: Path, fence: int) -> None:
        Manifest.collect(aside, {}, step=self.step, k=self.step, fence=fence, world=self.world.size, stage=2,
                         dtype="fp32").write(aside)
        ref = self.folder.final_checkpoint(self.step, fence)
        replace_dir(aside, ref.path)
        self.folder.write_pointer("latest", ref)
        if not self.lease or not self.lease.still_held():
            return
        for old in to_delete(self.folder.checkpoints(), keep_last=self.config.checkpoint.keep_last, latest=ref):
            delete(old)

    def record(self, code: ExitCode, reason: str, message: str = "") -> None:
        if self.status is not None and self.lease is not None:
            with contextlib.suppress(OSError):
                replace(self.status, step=self.step, k=self.step).ended(code, reason, message).write(self.folder)
            with contextlib.suppress(OSError):
                self.lease.release()


def load_vector(folder: Path) -> list[int]:
    """The whole vector of a checkpoint, however many ranks wrote it."""
    shards = sorted(folder.glob("shard-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    return [value for path in shards for value in json.loads(path.read_text())]


def start(config: RunConfig, own: RankEnvironment) -> Run:
    folder = RunFolder(Path(config.runs_dir) / config.name)
    timeout_s = config.launch.hang_timeout or 60.0
    own = meet(own, folder.meeting_dir, os.environ, timeout_s=config.launch.timeout) if own.world_size > 1 else own
    world = World(own, timeout_s)
    if own.rank:
        found = world.gather(None)[0]
        return Run(config, folder, world, None, None, found[0], found[1], found[1])
    forget_meeting(folder.meeting_dir)
    RunFolder.create(folder.root)
    lease = Lease.acquire(folder, slurm=SlurmJob.from_environment(os.environ))
    folder.clean_temporaries(lease.fence)
    status = Status(fence=lease.fence, started=time.time(), restarts=lease.fence - 1).write(folder)
    ref = newest_whole(folder)
    vector, step = ([0] * SIZE, 0) if ref is None else (load_vector(ref.path), ref.step)
    if ref is None:
        lease.set_fresh()
    else:
        lease.set_resumed_from(ref.step, ref.fence, hash_file(ref.path / "manifest.json"))
    status = replace(status, step=step, k=step, total_steps=int(config.train.length.amount)).write(folder)
    world.gather([vector, step])
    return Run(config, folder, world, lease, status, vector, step, step)


def main() -> None:
    own = rank_environment(os.environ) or RankEnvironment(0, 0, 1, "127.0.0.1", 0)
    signals = StopSignals.installed(is_main=own.rank == 0)
    config = load_run_config(sys.argv[1]).config
    run = None
    try:
        run = start(config, own)
        stop = StopRequests(run.folder, signals, is_main=own.rank == 0, max_hours=None, started=time.monotonic())
        signals.hold()
        with run.lease.beating() if run.lease is not None else contextlib.nullcontext():
            code = run.train(stop)
        run.record(code, run.reason)
        run.world.gather(None)
    except Lost as error:
        code = ExitCode.INTERNAL
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run is not None:
            run.record(code, "lost", str(error))
    except OSError as error:
        code = ExitCode.INTERNAL
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run is not None:
            run.record(code, "error", str(error))
    os._exit(int(code))


if __name__ == "__main__":
    main()
