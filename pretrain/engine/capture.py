"""Takes what DeepSpeed would write out of its hands: the state of this rank as it is at this moment, file by file.

DeepSpeed collects its state between collectives of its own. A disk that fails in the middle of them would leave the
ranks in different ones, so nothing is written there: `writing` does that afterwards.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.build import Engine
from pretrain.engine.shards import PRIVATE, TAG
from pretrain.engine.writing import TextFile, TorchFile

_SCRIPT = "zero_to_fp32.py"


def captured(engine: Engine, folder: Path, *, to_host: bool) -> list[TorchFile | TextFile]:
    """What DeepSpeed keeps of a checkpoint, as files of this rank below `folder`. Collective; nothing is written.

    With `to_host` every tensor is copied once, to host memory, and training may change the state afterwards. Without,
    tensors are the live ones.
    """
    ds = engine.ds
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    # Without partitions DeepSpeed notes no names: the optimizer's state is then told by the order of its parameters.
    ours = {} if engine.stage else {"optimizer_parameters": [[names[id(p)] for p in group["params"]]
                                                             for group in ds.optimizer.param_groups]}
    collector = _Collector(folder, _Taker(to_host))
    writer, ds.checkpoint_engine = ds.checkpoint_engine, collector
    ds._copy_recovery_script = lambda _: None  # the one file that it writes past its checkpoint engine
    try:
        ds.save_checkpoint(str(folder), tag=TAG, save_latest=False, client_state={PRIVATE: ours})
    finally:
        ds.checkpoint_engine = writer
        del ds._copy_recovery_script
    if to_host and engine.world.device.type == "cuda":
        torch.cuda.synchronize(engine.world.device)
    if collector.error is not None:
        raise collector.error
    script = [TextFile(_SCRIPT, _recovery_script())] if engine.stage and engine.world.is_main else []
    return [*collector.files, *script]


def _recovery_script() -> str:
    """DeepSpeed's own way from its shards to fp32 weights, which it puts beside them."""
    from deepspeed.utils import zero_to_fp32
    return Path(zero_to_fp32.__file__).read_text(encoding="utf-8")


class _Collector:
    """Stands in for DeepSpeed's checkpoint engine, and keeps what it is given to save.

    Never raises: the rank would miss the barriers that follow.
    """

    def __init__(self, folder: Path, take: _Taker) -> None:
        self.files: list[TorchFile] = []
        self.error: Exception | None = None
        self._folder = folder
        self._take = take

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            before = self._take.nbytes
            state = self._take(state_dict)
            name = Path(path).relative_to(self._folder).as_posix()
            self.files.append(TorchFile(name, state, self._take.nbytes - before))
        except Exception as error:
            self.error = self.error or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there before DeepSpeed is asked."""

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        """False keeps DeepSpeed from cloning the weights before they get here."""
        return False


class _Taker:
    """Rebuilds containers and copies other mutable objects, so that nothing that training changes is shared.

    A tensor that is a part of a larger one is always copied: torch would write all of the larger one. Tensors at the
    same place (tied weights) stay one. Both ways of taking lead to the same bytes on the disk, devices aside.
    """

    def __init__(self, to_host: bool) -> None:
        self.nbytes = 0
        """Of all tensors taken so far."""
        self._to_host = to_host
        self._taken: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        """Original (kept, so that its address is given to no other) and what was taken of it."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        kind = type(value)
        if kind in (dict, OrderedDict):
            return kind((key, self(member)) for key, member in value.items())
        if kind in (list, tuple):
            return kind(self(member) for member in value)
        return copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = tensor.is_contiguous()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.numel() if flat else (*tensor.shape,
                                                                                           *tensor.stride()))
        if key not in self._taken:
            self._taken[key] = tensor, self._copy(tensor) if self._to_host or not _whole(tensor) else tensor
            self.nbytes += tensor.nbytes
        return self._taken[key][1].view(tensor.shape)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._to_host or tensor.device.type == "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return host.copy_(tensor, non_blocking=True)


def _whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all that its memory holds."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
