"""Reads weights and optimizer state of a checkpoint parameter by parameter, whatever world size and stage wrote it.

DeepSpeed keeps fp32 masters and moments as flat tensors, cut over the ranks:

    stage 0     one file, every parameter by itself
    stage 1, 2  a flat tensor a parameter group, padded at its end and cut into `world` equal shards
    stage 3     every parameter padded and cut into `world` equal shards; a rank's shards of a sub-group in a row

In all of them element x of a flattened parameter is in shard (lead + x) // size, there at first + (lead + x) % size.
Files are mapped into memory when a range of them is first asked for, and only ever read: what is not copied out stays
on the disk, and the kernel can drop pages that were read.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import Manifest

TAG = "deepspeed"
"""Folder of DeepSpeed's files inside a checkpoint."""
PRIVATE = "pretrain"
"""Our one key among DeepSpeed's in its model file."""
Kind = Literal["master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a flattened parameter lies: element x in shard (lead + x) // size, at first + (lead + x) % size."""

    shape: tuple[int, ...]
    group: int
    """Index of the flat tensor in each shard."""
    size: int
    lead: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank wrote: flat fp32 masters by group, and torch's optimizer state of each."""

    masters: list[torch.Tensor]
    states: dict[int, dict[str, Any]]
    raw: Mapping[str, Any]

    def flat(self, kind: Kind, group: int) -> torch.Tensor:
        """The flat tensor of a group. Raises KeyError where the optimizer has no such moment."""
        tensor: torch.Tensor = self.masters[group] if kind == "master" else self.states[group][kind]
        return tensor.detach().view(-1)

    def steps(self) -> set[int]:
        """Step counts of all groups; none before the first update."""
        return {int(state["step"]) for state in self.states.values()}


class Shards(ABC):
    """fp32 masters and moments of the trained parameters of one checkpoint."""

    def __init__(self, checkpoint: Path, world: int) -> None:
        """Read the layout. The files are pickles: hold them to the manifest first.

        Raises DataCorruption where files are missing or not laid out as `world` ranks would.
        """
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unpickling imports DeepSpeed, which looks for one aloud
        self.folder = checkpoint / TAG
        self.world = world
        self._opened: dict[int, Shard] = {}
        self._opening = threading.Lock()
        self._header = self._map(self._header_pattern())
        first = self._read(0)
        steps = first.steps()
        if len(steps) > 1:
            raise DataCorruption(f"{self.folder}: parameters have seen {sorted(steps)} updates, one number is right")
        self.step: int | None = next(iter(steps), None)
        """Updates that the moments have seen; None before the first one, when there are no moments."""
        self.loss_scaler: Any = first.raw.get("loss_scaler")
        """DeepSpeed's, of fp16 runs."""
        self.global_steps: int = self._header["global_steps"]
        self.places: dict[str, Place] = dict(self._places(first))
        """Every trained parameter by name."""

    def copy(self, name: str, kind: Kind, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + len(out)) of a flattened parameter into the flat tensor `out` (any device).

        Several threads may ask at once.
        """
        place = self.places[name]
        done = 0
        while done < out.numel():
            rank, at = divmod(place.lead + start + done, place.size)
            count = min(out.numel() - done, place.size - at)
            flat = self._shard(rank).flat(kind, place.group)
            out.narrow(0, done, count).copy_(flat.narrow(0, place.first + at, count))
            done += count

    def whole(self, name: str, kind: Kind = "master") -> torch.Tensor:
        """The whole parameter, or its moment, in its shape on the CPU."""
        shape = self.places[name].shape
        out = torch.empty(prod(shape))
        self.copy(name, kind, 0, out)
        return out.view(shape)

    def _shard(self, rank: int) -> Shard:
        """What `rank` wrote, mapped and held to the layout."""
        with self._opening:
            if rank not in self._opened:
                shard = self._read(rank)
                steps = shard.steps()
                if steps != ({self.step} if self.step is not None else set()):
                    raise DataCorruption(f"{self.folder}: rank {rank} counts {sorted(steps)} updates, rank 0 "
                                         f"{self.step}")
                self._check(rank, shard)
                self._opened[rank] = shard
            return self._opened[rank]

    def _map(self, pattern: str) -> dict[str, Any]:
        """One of DeepSpeed's files, mapped into memory."""
        found = list(self.folder.glob(pattern))
        if len(found) != 1:
            raise DataCorruption(f"{self.folder}: holds {len(found)} files {pattern}, one is right")
        loaded: dict[str, Any] = torch.load(found[0], map_location="cpu", weights_only=False, mmap=True)
        return loaded

    def _map_optimizer(self, rank: int) -> dict[str, Any]:
        """The optimizer's part of what a rank wrote."""
        raw: dict[str, Any] = self._map(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        return raw

    def _groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Shape by name, in the order in which a partitioned optimizer flattened them."""
        return [{name: tuple(shape) for name, shape in group.items()} for group in self._header["param_shapes"]]

    @abstractmethod
    def _header_pattern(self) -> str:
        """Name of the file with the names of the parameters."""

    @abstractmethod
    def _read(self, rank: int) -> Shard:
        """What `rank` wrote, as it is."""

    @abstractmethod
    def _places(self, first: Shard) -> Iterator[tuple[str, Place]]:
        """Where each parameter lies; `first` is rank 0's shard."""

    @abstractmethod
    def _check(self, rank: int, shard: Shard) -> None:
        """Raise DataCorruption where a shard is not laid out as `places` says."""


class _Unpartitioned(Shards):
    """Stage 0."""

    def _header_pattern(self) -> str:
        return "mp_rank_00_model_states.pt"

    def _names(self) -> list[str]:
        return [name for group in self._header[PRIVATE]["optimizer_parameters"] for name in group]

    def _read(self, rank: int) -> Shard:
        optimizer = self._header["optimizer"]
        return Shard([self._header["module"][name] for name in self._names()], optimizer["state"], optimizer)

    def _places(self, first: Shard) -> Iterator[tuple[str, Place]]:
        for group, (name, value) in enumerate(zip(self._names(), first.masters, strict=True)):
            yield name, Place(tuple(value.shape), group, value.numel())

    def _check(self, rank: int, shard: Shard) -> None:
        pass  # names and shapes stand beside the values


class _FlatGroups(Shards):
    """Stages 1 and 2."""

    def _header_pattern(self) -> str:
        return "mp_rank_00_model_states.pt"

    def _read(self, rank: int) -> Shard:
        raw = self._map_optimizer(rank)
        return Shard(raw["single_partition_of_fp32_groups"], raw["base_optimizer_state"]["state"], raw)

    def _places(self, first: Shard) -> Iterator[tuple[str, Place]]:
        for group, members in enumerate(self._groups()):
            size = first.masters[group].numel() + first.raw["group_paddings"][group]
            paddings = first.raw["param_alignment_paddings"][group]
            lead = 0
            for (name, shape), padding in zip(members.items(), paddings, strict=True):
                yield name, Place(shape, group, size, lead=lead)
                lead += prod(shape) + padding

    def _check(self, rank: int, shard: Shard) -> None:
        """DeepSpeed notes down where it put each parameter: all must be where we look for them."""
        notes = shard.raw["param_slice_mappings"]
        noted = {(group, name): (address.start, address.numel)
                 for group, members in enumerate(notes) for name, address in members.items()}
        mine = {}
        for name, place in self.places.items():
            low = max(place.lead, rank * place.size)
            high = min(place.lead + prod(place.shape), (rank + 1) * place.size)
            if low < high:
                mine[place.group, name] = (low - rank * place.size, high - low)
        if noted != mine:
            raise DataCorruption(f"{self.folder}: rank {rank} keeps its parameters where {self.world} ranks would not")


class _SubGroups(Shards):
    """Stage 3."""

    def _header_pattern(self) -> str:
        return "zero_pp_rank_0_mp_rank_00_model_states.pt"

    def _read(self, rank: int) -> Shard:
        raw = self._map_optimizer(rank)
        return Shard(raw["fp32_flat_groups"], raw["optimizer_state_dict"]["state"], raw)

    def _places(self, first: Shard) -> Iterator[tuple[str, Place]]:
        for group, members in enumerate(self._groups()):
            at = 0
            for name, shape in members.items():
                size = -(-prod(shape) // self.world)
                yield name, Place(shape, group, size, first=at)
                at += size

    def _check(self, rank: int, shard: Shard) -> None:
        sizes: dict[int, int] = {}
        for place in self.places.values():
            sizes[place.group] = place.first + place.size
        if [master.numel() for master in shard.masters] != list(sizes.values()):
            raise DataCorruption(f"{self.folder}: rank {rank} has sub-groups of {[m.numel() for m in shard.masters]} "
                                 f"elements, of {self.world} ranks it would have {list(sizes.values())}")


def open_shards(checkpoint: Path, manifest: Manifest) -> Shards:
    """The reader for a checkpoint that has been held to its manifest."""
    kinds: dict[int, type[Shards]] = {0: _Unpartitioned, 1: _FlatGroups, 2: _FlatGroups, 3: _SubGroups}
    return kinds[manifest.stage](checkpoint, manifest.world)
