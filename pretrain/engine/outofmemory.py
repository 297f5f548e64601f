"""Running out of memory, in one line: in which phase, what the estimate expects of a rank, and what to change."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator

import psutil
import torch

from pretrain.config.machine import memory_bytes
from pretrain.config.memory import LIBRARIES_BYTES, gib, rank_memory
from pretrain.config.precision import DeviceKind
from pretrain.config.relief import reliefs
from pretrain.config.run import Precision, ResolvedBatch, RunConfig
from pretrain.engine.distributed import World
from pretrain.errors import PretrainError, UserError

_SAYS = re.compile(r"out of memory|can(no|')t allocate memory|not enough memory|std::bad_alloc|ALLOC_FAILED|"
                   r"failed to allocate|unable to allocate", re.IGNORECASE)
"""What allocators say: torch on CUDA and CPU, NumPy, the C++ library, cuBLAS and cuDNN, NCCL, the system."""
_TOO_LITTLE = 0.8
"""Share of the estimate to aim at where that would have fitted, and did not."""
_OTHERS = 2**30
"""Bytes of a GPU from which on it is said that others hold them; a CUDA context of our own takes about half of that."""
_PHASES = {"data": "reading data", "forward": "the forward pass", "backward": "the backward pass",
           "step": "the optimizer step", "save": "saving a checkpoint", "eval": "an evaluation",
           "other": "between two updates"}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, is an allocator that gave up."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, (RuntimeError, OSError)) and _SAYS.search(str(error)):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def memory_told(phase: str | Callable[[], str], config: RunConfig, batch: ResolvedBatch, precision: Precision,
                world: World) -> Iterator[None]:
    """Where the body runs out of memory, raise UserError with one line about it.

    `phase` says where that was, or gives the name of a phase of a step. Not collective: the rank that raises takes the
    others along.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PretrainError) or not is_out_of_memory(error):
            raise
        where = phase if isinstance(phase, str) else _PHASES[phase()]
        raise UserError(describe(where, config, batch, precision, world)) from error


def describe(where: str, config: RunConfig, batch: ResolvedBatch, precision: Precision, world: World) -> str:
    """The line. What a rank may use is what the device has, less what others hold of it."""
    kind: DeviceKind = "cuda" if world.device.type == "cuda" else "cpu"
    room, name, others = _room(world)
    expected = rank_memory(config, batch, precision, kind).device_bytes
    limit = room if expected > room else int(_TOO_LITTLE * expected)
    found = reliefs(config, batch, precision, kind, limit)
    cure = "set " + ", or ".join(map(str, found)) if found else \
        "no setting makes it fit; use a smaller model or data.seq_len"
    held = f", of which other processes hold {gib(others)}" if others > _OTHERS else ""
    fits = "" if expected > room else ", which should fit"
    return (f"rank {world.rank} ran out of memory in {where}: {name}{held}; the estimate expects {gib(expected)} a "
            f"rank with micro-batches of {batch.micro_batch_size} x {config.data.seq_len} tokens, ZeRO stage "
            f"{config.engine.zero_stage}, {precision}{fits}; {cure}")


def _room(world: World) -> tuple[int, str, int]:
    """Bytes that a rank may use for what the estimate counts, the device in words, bytes that others hold of it."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        others = max(0, total - free - torch.cuda.memory_reserved(world.device))
        return total - others, f"{torch.cuda.get_device_name(world.device)} has {gib(total)}", others
    ranks = sum(peer.node == world.peers[world.rank].node for peer in world.peers) if world.peers else 1
    share = memory_bytes() // ranks
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        memory = psutil.Process().memory_info()
        limit = max(0, limit - memory.vms + memory.rss)  # what is mapped and not in memory counts as well
        if limit < share:
            return max(0, limit - LIBRARIES_BYTES), f"ulimit -v leaves it {gib(limit)}", 0
    return max(0, share - LIBRARIES_BYTES), f"its share of this machine is {gib(share)}", 0
