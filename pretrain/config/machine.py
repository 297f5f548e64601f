"""Facts about this machine, gathered without torch: processor flags, memory, GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.precision import DeviceFacts

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as `nvidia-smi` describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    driver: str


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the processor; empty where the system does not tell (not Linux)."""
    return frozenset(_cpuinfo("flags", cpuinfo).split())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor, "unknown" where the system does not tell."""
    return _cpuinfo("model name", cpuinfo) or "unknown"


def _cpuinfo(key: str, path: Path) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def cpu_count() -> int:
    """Cores this process may use (affinity, not what the board has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that has a lower limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def gpus() -> list[Gpu]:
    """NVIDIA GPUs that `nvidia-smi` lists; none where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        done = subprocess.run([program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Rows of `name, MiB, major.minor, driver`; rows of another form are passed over."""
    found = []
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 4 and cells[1].isdigit() and cells[2].replace(".", "", 1).isdigit():
            major, _, minor = cells[2].partition(".")
            found.append(Gpu(cells[0], int(cells[1]) * 2**20, (int(major), int(minor or 0)), cells[3]))
    return found


def device_facts(cards: list[Gpu] | None = None) -> DeviceFacts:
    """What a run started here would train on, as far as can be told without torch. `cards`: what `gpus` returned."""
    cards = gpus() if cards is None else cards
    if cards:
        return DeviceFacts("cuda", cuda_capability=min(card.capability for card in cards))
    return DeviceFacts("cpu", cpu_flags=cpu_flags())


def jit_cache_dir() -> Path:
    """Where torch compiles C++ ops to: `TORCH_EXTENSIONS_DIR`, else its default in the user's cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "torch_extensions"


def stale_locks(older_than_s: float = 600.0) -> list[Path]:
    """Lock files in the JIT cache that a killed compile left behind. torch would wait for them for ever."""
    found = []
    for lock in jit_cache_dir().glob("**/lock"):
        try:
            if time.time() - lock.stat().st_mtime > older_than_s:
                found.append(lock)
        except OSError:  # its compile has just ended
            continue
    return found
