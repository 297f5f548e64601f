"""What one machine finds out about itself before ranks start: `python -P -m slurm.nodecheck RUN`, one task a machine.

GPUs, their memory errors and Xid events, the disk of the run folder, the clock; with `slurm.checks: full` also a matrix
product on each device and the speed of all-reduces with the neighbouring machines, for which torch is loaded. Every
machine writes `slurm/log/JOB-RESTART/machine-NODE.json`; what it means is judged by `slurm.machines`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.engine.ranks import node_name
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic
from slurm.machines import ABSENT
from slurm.script import frozen_config

_QUERY = ("index", "uuid", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
_XID = re.compile(r"^\[\s*(\d+)\.\d+\].*NVRM: Xid \((?:PCI:)?([^)]+)\): (\d+)")
_FILE = 16 * 2**20
_ROOM = 64 * _FILE
_PROGRAM_S = 30.0


def results_dir(folder: RunFolder, job: str, restart: int) -> Path:
    """Logs and results of one start."""
    return folder.slurm_dir / "log" / f"{job}-{restart}"


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Rows that `nvidia-smi --query-gpu=...` writes as CSV: index, uuid, uncorrected errors, pages to be retired.

    A figure that the device does not give is None. Rows of another form count as a GPU that does not answer.
    """
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(_QUERY) and cells[0].isdigit():
            found.append({"index": int(cells[0]), "uuid": cells[1], "uncorrected": _number(cells[2]),
                          "pending": {"yes": True, "no": False}.get(cells[3].lower())})
        elif line.strip():
            found.append({"index": None, "error": line.strip()})
    return found


def parse_xids(text: str, uptime_s: float, within_s: float) -> list[dict[str, Any]]:
    """Xid events of the kernel's log that are no older than `within_s`: device and number, each once."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in text.splitlines():
        match = _XID.match(line)
        if match and uptime_s - int(match[1]) <= within_s:
            found[match[2], int(match[3])] = {"device": match[2], "xid": int(match[3])}
    return list(found.values())


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _said(*command: str) -> str | None:
    """Output of a program; None where it is not there, may not be asked, or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_S, check=False)
        return done.stdout if done.returncode == 0 else None
    return None


def look(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Everything that needs no other machine and no torch; plain values."""
    found: dict[str, Any] = {"node": node_name()}
    if config.slurm and config.slurm.gpus_per_node:
        text = _said("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
        there = shutil.which("nvidia-smi") is not None
        found["gpus"] = parse_gpus(text) if text is not None else None if there else ABSENT
        log = _said("dmesg")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        found["xids"] = None if log is None else parse_xids(log, uptime, 24 * 3600.0)
    found |= _disk_and_clock(folder)
    return found


def _disk_and_clock(folder: RunFolder) -> dict[str, Any]:
    """Speed of writing to the run folder, and how far this clock is from that of its file server.

    Where the disk is nearly full its speed is not measured, so that machines that look at once do not fill it: a full
    disk is no machine's fault, and the run says by itself how much it lacks.
    """
    probe = folder.slurm_dir / f"probe-{node_name()}.tmp"
    found: dict[str, Any] = {}
    try:
        found["free"] = shutil.disk_usage(folder.root).free
        if found["free"] >= _ROOM:
            found["disk"] = _write_rate(probe)
        probe.touch()
        found["skew"] = time.time() - probe.stat().st_mtime
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return {"disk_error": f"{error.filename}: {error.strerror}"}
        found["free"] = 0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return found


def _write_rate(path: Path) -> float:
    """Bytes a second of a flushed file."""
    data = os.urandom(_FILE)
    started = time.perf_counter()
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return _FILE / (time.perf_counter() - started)


def exercise(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """FLOP/s of each device here, and bytes a second of all-reduces with the machine before and the one after."""
    from pretrain.engine.ranks import meet, rank_environment
    found: dict[str, Any] = {"flops": _matmul(config)}
    own = rank_environment(os.environ)
    if own is None:
        return found
    import torch
    import torch.distributed as dist

    from pretrain.engine.distributed import join
    world = join(meet(own, folder.meeting_dir, os.environ, timeout_s=60), timeout_s=60, preflight_s=60)
    rates = []
    tensor = torch.ones(2**22, device=world.device)
    for first in (0, 1):  # neighbours in two ways, so that a slow pair is told from a slow machine
        pairs = [list(range(left, left + 2)) for left in range(first, world.size - 1, 2)]
        groups = [dist.new_group(pair) for pair in pairs]
        for pair, group in zip(pairs, groups, strict=True):
            if world.rank in pair:
                rates.append(_all_reduce(tensor, group))
        world.barrier()
    found["links"] = rates
    world.barrier()
    return found


def _all_reduce(tensor: Any, group: Any) -> float:
    import torch.distributed as dist
    times = []
    for _ in range(4):
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        tensor[0].item()
        times.append(time.perf_counter() - started)
        tensor.fill_(1.0)
    return float(tensor.numel() * tensor.element_size() / min(times))


def _matmul(config: RunConfig) -> list[float]:
    import torch
    cuda = bool(config.slurm and config.slurm.gpus_per_node and torch.cuda.is_available())
    size, rates = 8192 if cuda else 512, []
    for device in [f"cuda:{index}" for index in range(torch.cuda.device_count())] if cuda else ["cpu"]:
        a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - started)
        rates.append(2 * size**3 / min(times))
    return rates


def main(arguments: Sequence[str]) -> int:
    """This machine's result, in its file."""
    folder = RunFolder(Path(arguments[0]))
    config = load_run_config(frozen_config(folder)).config
    target = results_dir(folder, os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"machine-{node_name()}.json"
    found = look(config, folder)
    write_json_atomic(path, found)  # known even where what follows hangs
    if config.slurm and config.slurm.checks == "full":
        found |= exercise(config, folder)
        write_json_atomic(path, found)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
