"""A job of a few minutes that tells what works on a cluster: `pretrain slurm smoke`.

Its sbatch file, helper, lease and requeueing are those of training; only what the ranks do is this module
(`python -P -m slurm.smoke CONFIG`). The first start looks around, waits for the signal before the time limit and stops
as training would; the job requeues itself; the second start says that it could.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.engine.ranks import RankEnvironment, meet, rank_environment
from pretrain.engine.stopping import StopSignals
from pretrain.errors import ExitCode, UserError
from pretrain.runfolder.holder import SlurmJob
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import write_json_atomic
from pretrain.runfolder.status import Status
from slurm.history import read_history

SETS = ("name=smoke", "slurm.time='2'", "slurm.save_before=55", "slurm.restart=requeue", "slurm.max_restarts=1",
        "slurm.min_nodes=null", "batch.global_batch_size=null", "batch.micro_batch_size=1",
        "batch.gradient_accumulation_steps=1", "launch.timeout=60", "launch.preflight=60")
"""What makes any config a job of two minutes."""
_SIGNAL_S = 100.0
_SKEW_S = 1.0
_SLOW_DISK = 100e6
_FILE = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    state: str
    """ok, note or problem."""
    text: str


def report_file(folder: RunFolder) -> Path:
    """Where the checks of a smoke job are."""
    return folder.slurm_dir / "smoke.json"


def read_report(folder: RunFolder) -> list[Check]:
    """What is known so far."""
    with contextlib.suppress(FileNotFoundError):
        return [Check(**row) for row in json.loads(report_file(folder).read_bytes())]
    return []


def look_around(config: RunConfig, own: RankEnvironment, folder: RunFolder) -> dict[str, Any]:
    """What one rank sees of its machine and of the run folder; plain values."""
    found: dict[str, Any] = {"rank": own.rank, "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
                             "cpus": len(os.sched_getaffinity(0))}
    try:
        found["address"] = socket.getaddrinfo(own.master_addr, None)[0][4][0]
    except OSError as error:
        found["address_error"] = str(error)
    probe = folder.slurm_dir / f"smoke-{own.rank}.tmp"
    try:
        started = time.perf_counter()
        with open(probe, "wb") as file:
            file.write(os.urandom(_FILE))
            os.fsync(file.fileno())
        found["disk"] = _FILE / (time.perf_counter() - started)
        found["free"] = shutil.disk_usage(folder.root).free
    except OSError as error:
        found["disk_error"] = f"{error.filename}: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    (folder.slurm_dir / f"smoke-{own.rank}.here").write_text(found["node"])
    return found


def judge(rows: Sequence[Mapping[str, Any]], gpus_per_node: int) -> Iterator[Check]:
    """Lines about machines and disk. Pure."""
    nodes = {row["node"] for row in rows}
    yield Check("machines", "ok", f"{len(rows)} ranks on {', '.join(sorted(nodes))}; "
                f"{min(row['cpus'] for row in rows)} CPUs a rank or more")
    unresolved = [row for row in rows if "address_error" in row]
    loopback = [row for row in rows if str(row.get("address", "")).startswith("127.")]
    if unresolved:
        yield Check("names", "problem", f"{unresolved[0]['node']} cannot resolve the machine of rank 0 "
                    f"({unresolved[0]['address_error']})")
    elif loopback and len(nodes) > 1:
        yield Check("names", "note", f"{loopback[0]['node']} resolves the machine of rank 0 to "
                    f"{loopback[0]['address']}; if ranks do not meet, name the interface (GLOO_SOCKET_IFNAME in "
                    "slurm.env)")
    else:
        yield Check("names", "ok", f"the machine of rank 0 is {rows[0].get('address', '?')}")
    skew = max(row["clock"] for row in rows) - min(row["clock"] for row in rows)
    yield Check("clocks", "ok" if skew < _SKEW_S else "note", f"within {skew:.2f} s")
    broken = next((row for row in rows if "disk_error" in row), None)
    if broken is not None:
        yield Check("run folder", "problem", f"{broken['node']}: {broken['disk_error']}")
    else:
        slowest = min(row["disk"] for row in rows)
        yield Check("run folder", "ok" if slowest > _SLOW_DISK else "note",
                    f"{slowest / 1e6:.0f} MB/s a rank, all writing at once; "
                    f"{min(row['free'] for row in rows) / 1e9:.0f} GB free")
    if gpus_per_node:
        short = [row for row in rows if row.get("gpus", 0) < gpus_per_node]
        yield Check("gpus", "problem" if short else "ok",
                    f"{short[0]['node']} shows {short[0].get('gpus', 0)} of {gpus_per_node} GPUs" if short else
                    f"{gpus_per_node} x {rows[0]['gpu']} on each machine")


def first_start(config: RunConfig, own: RankEnvironment, folder: RunFolder, signals: StopSignals) -> ExitCode:
    """Look around, let the ranks reach each other, wait for the signal, and stop as training would."""
    started = time.perf_counter()
    from pretrain.engine.distributed import join  # torch: seconds
    from pretrain.engine.preflight import rank_table
    imported = time.perf_counter() - started
    mine = look_around(config, own, folder)
    world = join(meet(own, folder.meeting_dir, os.environ, timeout_s=config.launch.timeout),
                 timeout_s=config.launch.timeout, preflight_s=config.launch.preflight)
    mine |= {"imported": imported, **_devices()}
    world.barrier()
    mine["clock"] = time.time()
    rows = world.gather_objects(mine)
    checks = list(judge(rows, config.slurm.gpus_per_node if config.slurm else 0))
    checks.append(Check("python", "ok", f"torch imported in {max(row['imported'] for row in rows):.0f} s; "
                        f"{rank_table(world.peers)[-1]}"))
    checks.append(_seen(folder, world.size))
    checks.append(_all_reduce(world))
    lease = None
    if world.is_main:
        lease = Lease.acquire(folder, slurm=SlurmJob.from_environment(os.environ))
        lease.set_fresh()
        status = Status(fence=lease.fence, started=time.time(), step=1, total_steps=2).write(folder)
        _write(folder, checks)
    signals.hold()
    came = _await_signal(world, signals)
    if world.is_main and lease is not None:
        text = f"came {came:.0f} s after ranks had started" if came is not None else \
            f"did not come within {_SIGNAL_S:.0f} s; a time limit will end runs without a checkpoint"
        _write(folder, [*checks, Check("signal", "ok" if came is not None else "problem", text)])
        code = ExitCode.STOPPED if came is not None else ExitCode.DONE
        replace(status, step=1).ended(code, signals.reason or "no signal").write(folder)
        lease.release()
    world.barrier()
    return ExitCode.STOPPED if came is not None else ExitCode.DONE


def second_start(own: RankEnvironment, folder: RunFolder) -> ExitCode:
    """The job came back: say how long that took."""
    if own.rank == 0:
        before, present = read_history(folder)[-2:]
        waited = present.begun - (before.ended or present.begun)
        told = {"time limit": "told from other signals", "asked": "taken for one of an operator"}.get(
            before.cause, before.cause)
        _write(folder, [*read_report(folder), Check("time limit", "ok" if before.cause == "time limit" else "note",
                                                    f"the signal before it is {told}"),
                        Check("requeue", "ok", f"the job requeued itself and waited {waited:.0f} s")])
        lease = Lease.acquire(folder, slurm=SlurmJob.from_environment(os.environ))
        lease.set_fresh()
        Status(fence=lease.fence, started=time.time(), step=2, total_steps=2).ended(ExitCode.DONE, "done").write(folder)
        lease.release()
    return ExitCode.DONE


def _devices() -> dict[str, Any]:
    import torch
    count = torch.cuda.device_count()
    return {"gpus": count, "gpu": torch.cuda.get_device_name(0)} if count else {"gpus": 0}


def _seen(folder: RunFolder, ranks: int) -> Check:
    """Whether every rank's file can be seen from here."""
    deadline = time.monotonic() + 30
    while True:
        missing = [rank for rank in range(ranks) if not (folder.slurm_dir / f"smoke-{rank}.here").exists()]
        if not missing or time.monotonic() > deadline:
            break
        os.listdir(folder.slurm_dir)
        time.sleep(0.2)
    if missing:
        return Check("shared folder", "problem", f"files of rank {', '.join(map(str, missing))} cannot be seen: "
                     f"{folder.root} must be one folder for all machines")
    return Check("shared folder", "ok", f"{folder.root} is one for all machines")


def _all_reduce(world: Any) -> Check:
    """Time a few sums of 16 MB over all ranks."""
    import torch
    import torch.distributed as dist
    tensor = torch.ones(2**22, device=world.device)
    times = []
    for _ in range(4):
        world.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()
        times.append(time.perf_counter() - started)
        tensor.fill_(1.0)
    rate = 2 * (world.size - 1) / world.size * 2**24 / min(times)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    return Check("all-reduce", "ok", f"{rate / 1e9:.2f} GB/s a rank over {backend} (16 MB on {world.size} ranks)")


def _await_signal(world: Any, signals: StopSignals) -> float | None:
    """Seconds until all ranks knew of a signal to any of them."""
    started = time.monotonic()
    while time.monotonic() - started < _SIGNAL_S:
        if world.reduce_ints([int(bool(signals.reason))], "max")[0]:
            return time.monotonic() - started
        time.sleep(0.5)
    return None


def _write(folder: RunFolder, checks: Sequence[Check]) -> None:
    write_json_atomic(report_file(folder), [asdict(check) for check in checks])


def main(arguments: Sequence[str]) -> int:
    """One rank. Returns the exit code."""
    own = rank_environment(os.environ) or RankEnvironment(0, 0, 1, "127.0.0.1", _free_port())
    signals = StopSignals.installed(is_main=own.rank == 0)
    config = load_run_config(arguments[0]).config
    folder = RunFolder(Path(config.runs_dir) / config.name)
    if os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0"):
        return int(second_start(own, folder))
    try:
        return int(first_start(config, own, folder, signals))
    except UserError as error:
        if own.rank == 0:
            _write(folder, [*read_report(folder), Check("meeting", "problem", str(error))])
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.code)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
