"""What `pretrain doctor` finds out: facts about this machine and what they mean for training. No torch."""

from __future__ import annotations

import importlib.util
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pretrain.cli.plan_text import resolve_precision
from pretrain.config import machine
from pretrain.config.load import load_run_config
from pretrain.config.memory import LIBRARIES_BYTES, gib
from pretrain.config.plan import make_plan
from pretrain.config.precision import DeviceFacts, advise_precision
from pretrain.config.presets import list_presets, preset_path
from pretrain.errors import PretrainError

State = Literal["ok", "note", "problem"]
_PACKAGES = ("pretrain", "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors", "webdataset",
             "datasets", "numpy", "pydantic", "tensorboard", "wandb", "nvidia-ml-py")
_OPEN_FILES = 4096
_SHARED_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do about it."""

    topic: str
    state: State
    text: str


def examine() -> list[Finding]:
    """Everything worth knowing before a run is started on this machine."""
    cards = machine.gpus()
    facts = machine.device_facts(cards)
    return [*_versions(), *_hardware(cards), *_precision(facts), *_compiler(), *_jit_cache(), *_limits(),
            *_presets(facts, cards)]


def report(findings: list[Finding]) -> str:
    """Findings as text, a line each."""
    width = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{finding.state:<8}{finding.topic:<{width}}  {finding.text}" for finding in findings)


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings for programs."""
    return [asdict(finding) for finding in findings]


def _versions() -> Iterator[Finding]:
    version = sys.version_info
    supported = (3, 11) <= version[:2] <= (3, 12)
    yield Finding("python", "ok" if supported else "problem",
                  f"{platform.python_version()} at {sys.executable}{'' if supported else '; 3.11 or 3.12 is needed'}")
    for name in _PACKAGES:
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            if name not in ("wandb", "nvidia-ml-py"):
                yield Finding(name, "problem", "not installed; install the package again with the constraints file")


def _hardware(cards: list[machine.Gpu]) -> Iterator[Finding]:
    fast = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & machine.cpu_flags())
    yield Finding("cpu", "ok", f"{machine.cpu_name()}, {machine.cpu_count()} cores, {', '.join(fast) or 'no AVX2'}")
    yield Finding("memory", "ok", gib(machine.memory_bytes()))
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", "ok" if free > 10 * 2**30 else "note", f"{gib(free)} free in the working folder")
    for number, card in enumerate(cards):
        tf32 = "has TF32, which runs in fp32 do not use" if card.capability >= (8, 0) else "has no TF32"
        yield Finding(f"gpu {number}", "ok", f"{card.name}, {gib(card.memory_bytes)}, capability "
                      f"{card.capability[0]}.{card.capability[1]}, driver {card.driver}; {tf32}")
    if not cards:
        yield Finding("gpu", "note", "none that nvidia-smi lists; training runs on the CPU")
    elif metadata.version("torch").endswith("+cpu"):
        yield Finding("gpu", "problem", "torch is a CPU build and will not use the GPU; install a CUDA build")


def _precision(facts: DeviceFacts) -> Iterator[Finding]:
    for stage in (0, 1, 2, 3):
        precision, reason = advise_precision(facts, stage)
        yield Finding(f"precision, ZeRO-{stage}", "ok", f"auto is {precision}: {reason}")


def _compiler() -> Iterator[Finding]:
    found = shutil.which("g++") or shutil.which("c++")
    needed_for = "needed for CPU offload of the optimizer and for engine.compile"
    if found is None:
        yield Finding("compiler", "note", f"no g++; {needed_for}")
    else:
        done = subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True, timeout=20, check=False)
        yield Finding("compiler", "ok", f"{found} {done.stdout.strip()}")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        yield Finding("headers", "note", f"no {headers}; install python3-dev, {needed_for}")
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        yield Finding("ninja", "note", f"not found; {needed_for}")


def _jit_cache() -> Iterator[Finding]:
    root = machine.jit_cache_dir()
    ops = sorted(path.stem for path in root.glob("**/*.so"))
    yield Finding("compiled ops", "ok", f"{', '.join(ops) or 'none yet'} in {root}")
    for lock in machine.stale_locks():
        yield Finding("compiled ops", "problem", f"{lock} is left by a compile that was killed, and whatever needs the "
                      "op waits for it; delete the file while nothing compiles")


def _limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= _OPEN_FILES
    advice = "" if enough else f"; datasets of many shards need more: ulimit -n {_OPEN_FILES}"
    yield Finding("open files", "ok" if enough else "note", f"at most {files}{advice}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < _SHARED_MEMORY
        advice = "; GPU collectives and loader processes need 1 GiB (containers: --shm-size)" if small else ""
        yield Finding("/dev/shm", "note" if small else "ok", gib(size) + advice)


def _presets(facts: DeviceFacts, cards: list[machine.Gpu]) -> Iterator[Finding]:
    for name in list_presets():
        try:
            yield _fit(name, facts, cards)
        except PretrainError as error:
            yield Finding(f"preset {name}", "problem", str(error))


def _fit(name: str, facts: DeviceFacts, cards: list[machine.Gpu]) -> Finding:
    """Whether a preset trains here with one rank a GPU, or as it stands on the CPU."""
    config = load_run_config(preset_path(name)).config
    world = len(cards) or config.launch.nproc
    plan = make_plan(config, world, precision=resolve_precision(config, facts)[0], device=facts.kind)
    if cards:
        need, have = plan.memory.device_bytes, min(card.memory_bytes for card in cards)
        unit = "a GPU"
    else:
        need, have = world * (plan.memory.device_bytes + LIBRARIES_BYTES), machine.memory_bytes()
        unit = f"for {world} rank{'s' if world > 1 else ''}"
    fits = need < have
    return Finding(f"preset {name}", "ok" if fits else "note",
                   f"{'fits' if fits else 'does not fit'}: {gib(need)} {unit} of the {gib(have)} here, with "
                   f"micro-batch {plan.batch.micro_batch_size}")
