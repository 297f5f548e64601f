"""Takes what DeepSpeed would write out of its hands: the state of this rank as it is at this moment, file by file.

DeepSpeed collects its state between collectives of its own. A disk that fails in the middle of them would leave the
ranks in different ones, so nothing is written there: `writing` does that afterwards.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.engine.build import Engine
from pretrain.engine.shards import PRIVATE, TAG
from pretrain.engine.writing import TextFile, TorchFile

_SCRIPT = "zero_to_fp32.py"
_FILLED = 0.9
"""Share of a piece of memory that tensors must fill to be written together with it; the rest is padding."""


def captured(engine: Engine, folder: Path, *, to_host: bool) -> list[TorchFile | TextFile]:
    """What DeepSpeed keeps of a checkpoint, as files of this rank below `folder`. Collective; nothing is written.

    With `to_host` every tensor is copied once, to host memory, and training may change the state afterwards. Without,
    tensors are the live ones, but for small parts of large buffers.
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

    DeepSpeed lays weights into flat buffers. Where tensors fill the memory in which they lie, that is taken as one
    piece with the tensors in it, as `torch.save` writes it; a small part of a large buffer is copied out, always to the
    host. Both ways of taking lead to the same bytes on the disk, devices aside.
    """

    def __init__(self, to_host: bool) -> None:
        self.nbytes = 0
        """Of all memory taken so far."""
        self._to_host = to_host
        self._taken: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        """Original (kept, so that its address is given to no other) and what was taken of it."""

    def __call__(self, state: Any) -> Any:
        """The content of one file."""
        seen: dict[_Memory, set[tuple[int, ...]]] = {}
        for tensor in _tensors(state):
            seen.setdefault(_memory(tensor), set()).add((tensor.storage_offset(), tensor.nbytes))
        filled = {memory for memory, parts in seen.items() if sum(size for _, size in parts) >= _FILLED * memory.nbytes}
        mixed = {memory.place for memory in filled if sum(other.place == memory.place for other in seen) > 1}
        return self._rebuilt(state, {memory for memory in filled if memory.place not in mixed})

    def _rebuilt(self, value: Any, filled: Collection[_Memory]) -> Any:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach(), filled)
        if kind in (dict, OrderedDict):
            return kind((key, self._rebuilt(member, filled)) for key, member in value.items())
        if kind in (list, tuple):
            return kind(self._rebuilt(member, filled) for member in value)
        return copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor, filled: Collection[_Memory]) -> torch.Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        memory = _memory(tensor)
        if memory not in filled:
            key = memory, tensor.storage_offset(), tensor.shape, tensor.stride()
            return self._once(key, tensor, lambda: _host_copy(tensor))
        all_of_it = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        taken = self._once(memory, all_of_it, lambda: _host_copy(all_of_it) if self._to_host else all_of_it)
        return taken.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _once(self, key: Any, tensor: torch.Tensor, take: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._taken:
            self._taken[key] = tensor, take()
            self.nbytes += tensor.nbytes
        return self._taken[key][1]


class _Memory(NamedTuple):
    """What a tensor lies in, as tensors of one type see it."""

    place: tuple[torch.device, int]
    nbytes: int
    dtype: torch.dtype


def _memory(tensor: torch.Tensor) -> _Memory:
    storage = tensor.untyped_storage()
    return _Memory((tensor.device, storage.data_ptr()), storage.nbytes(), tensor.dtype)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, in pageable memory: torch rounds pinned memory up to a power of two and keeps it for good."""
    return tensor.to("cpu", memory_format=torch.contiguous_format, copy=True)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor with elements in a nest of containers."""
    if isinstance(value, torch.Tensor):
        yield from [value] if value.numel() else []
    elif type(value) in (dict, OrderedDict):
        for member in value.values():
            yield from _tensors(member)
    elif type(value) in (list, tuple):
        for member in value:
            yield from _tensors(member)
