"""DeepSpeed's traps and their cures, each with a test that fails when the cure is removed.

Nothing else in the stack knows of them. Versions: deepspeed 0.19.8.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from pretrain.config.machine import stale_locks

_log = logging.getLogger("pretrain")


def skip_op_probing() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective at every start on a CPU.

    `init_distributed` asks a table of compatible ops, and building that table runs compilers; the op would then be
    compiled for half a minute, and serves one inference call that training never makes.
    """
    import deepspeed.ops
    deepspeed.ops.__dict__["__compatible_ops__"] = {}


def remove_stale_locks(older_than_s: float = 600.0) -> list[Path]:
    """Delete lock files that a killed compile left behind; torch would wait for them for ever. Returns them."""
    removed = stale_locks(older_than_s)
    for lock in removed:
        lock.unlink(missing_ok=True)
        _log.warning("removed %s: left by a compile that was killed", lock)
    return removed


def float_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all floating-point buffers, to be given back after `deepspeed.initialize`.

    DeepSpeed casts the whole module to the training dtype. In bf16 that ruins rotary frequencies: positions beyond a
    few hundred lose their order.
    """
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def restore_buffers(module: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Put the saved buffers back in their own dtype, on the device where the module is."""
    for name, value in saved.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        current = owner._buffers[leaf]
        assert current is not None
        owner._buffers[leaf] = value.to(current.device)


def set_partitioned_master(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the fp32 master of a ZeRO-3 parameter on every rank from its whole value.

    DeepSpeed's own setter cuts the value without the padding of the last rank's share and fails wherever the number of
    elements is not a multiple of the world size.
    """
    optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
    partition, group = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
    start = partition.numel() * optimizer._get_param_partition_rank(parameter)
    own = value.flatten()[start:start + partition.numel()]
    partition.data[:own.numel()].copy_(own)
    if optimizer._swappable_optimizer_subgroup(group):
        optimizer._optimizer_states_and_gradient_swap_out(group)


def quiet() -> None:
    """Warnings and errors of DeepSpeed are enough; and it calls collectives that torch has renamed, at every step."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
