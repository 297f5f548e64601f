"""`environment.json`: what a run ran on, as far as it may matter to whoever repeats it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.config import machine

_PACKAGES = ("pretrain", "torch", "deepspeed", "transformers", "accelerate", "datasets", "webdataset", "tokenizers",
             "safetensors", "numpy", "pydantic", "triton", "flash-linear-attention")
_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID",
          "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME")


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, source, command line and Slurm ids; no other environment variable, as they hold secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "packages": _versions(),
        "hardware": _hardware(),
        "source": _source(Path(__file__).resolve().parents[1]),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    import torch
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": machine.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": machine.cpu_count(),
        "memory_bytes": machine.memory_bytes(),
        "cuda": torch.version.cuda,
        "devices": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }


def _source(package: Path) -> dict[str, Any]:
    """Commit of the git tree that the package belongs to, and whether its files differ; empty if it is in none.

    A package installed inside somebody else's repository does not belong to it: git must know its files.
    """
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10,
                                  check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
