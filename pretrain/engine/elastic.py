"""Puts a checkpoint of any world size, ZeRO stage and precision into a live engine.

There is one way for every pair: each rank asks its own optimizer which ranges of which parameters it holds, and copies
just these from the mapped shards into masters and moments. No rank gathers anything, and none holds a second copy of
its state: beyond the engine's own tensors a load takes the index of the shards. Hyper-parameters (decay, betas) are
those of the live engine, which took them from the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.build import Engine
from pretrain.engine.shards import MOMENTS, Kind, Shards, open_shards
from pretrain.errors import UserError
from pretrain.runfolder.hashing import threads_of_a_rank
from pretrain.runfolder.publish import Manifest


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, at `at` in a tensor of the optimizer."""

    name: str
    start: int
    numel: int
    at: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A tensor that this rank's optimizer updates, and what lies in it. The rest of it is padding."""

    master: torch.Tensor
    fragments: tuple[Fragment, ...]


def restore(engine: Engine, checkpoint: Path, manifest: Manifest) -> None:
    """Set weights, moments and step counts of an engine to those of a verified checkpoint. Collective.

    The engine is fresh or stands at a step boundary.

    Raises UserError where the checkpoint's trained parameters are not the engine's, before anything is changed.
    """
    zero = engine.ds.optimizer
    if engine.stage == 3:
        zero.checkpoint_event_prologue()
    engine.world.all_or_none(lambda: _fill(engine, open_shards(checkpoint, manifest), manifest))
    if engine.stage in (1, 2):
        zero.update_lp_params()
    elif engine.stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()


@torch.no_grad()
def _fill(engine: Engine, shards: Shards, manifest: Manifest) -> None:
    check_parameters(engine, shards)
    optimizer = engine.ds.optimizer if engine.stage == 0 else engine.ds.optimizer.optimizer
    with ThreadPoolExecutor(threads_of_a_rank(), "load") as pool:
        for holding in holdings(engine):
            targets: dict[Kind, torch.Tensor] = {"master": holding.master.data}
            if shards.step is not None:
                targets |= {kind: torch.empty_like(holding.master.data, dtype=torch.float32) for kind in MOMENTS}
                optimizer.state[holding.master] = {kind: targets[kind] for kind in MOMENTS}
                optimizer.state[holding.master]["step"] = _step(optimizer, holding.master, shards.step)
            else:  # from before the first update, when there are no moments
                optimizer.state.pop(holding.master, None)
            if sum(fragment.numel for fragment in holding.fragments) < holding.master.numel():
                for tensor in targets.values():
                    tensor.zero_()
            _copy(pool, shards, holding.fragments, targets)
    engine.ds.global_steps = shards.global_steps
    if engine.precision == manifest.dtype == "fp16":
        engine.ds.optimizer.loss_scaler = shards.loss_scaler


def _copy(pool: ThreadPoolExecutor, shards: Shards, fragments: Sequence[Fragment],
          targets: Mapping[Kind, torch.Tensor]) -> None:
    """Fill the tensors of one holding, several fragments at a time."""
    def one(kind: Kind, fragment: Fragment) -> None:
        with torch.no_grad():  # set for each thread by itself
            out = targets[kind].view(-1).narrow(0, fragment.at, fragment.numel)
            shards.copy(fragment.name, kind, fragment.start, out)

    for done in [pool.submit(one, kind, fragment) for kind in targets for fragment in fragments]:
        done.result()


def _step(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int) -> Any:
    """A step count for one tensor and no other, in the form in which the optimizer keeps it."""
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        return torch.tensor(float(step), dtype=torch.float32, device=master.device if on_device else "cpu")
    return step  # DeepSpeedCPUAdam


def check_parameters(engine: Engine, shards: Shards) -> None:
    """Raise UserError unless the checkpoint has trained exactly the parameters that the engine trains."""
    where = shards.folder.parent
    trained = {name: tuple(getattr(parameter, "ds_shape", parameter.shape))
               for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    mine = {name: shape for name, shape in trained.items() if 0 not in shape}
    for name, shape in mine.items():
        place = shards.places.get(name)
        if place is None:
            raise UserError(f"{where}: has no optimizer state of {name}, which this run trains: it is of another "
                            "model, or the parameter was frozen; start with train.init_from")
        if place.shape != shape:
            raise UserError(f"{where}: {name} is {place.shape} there, the model's is {shape}; it is of another model")
    for name in shards.places:
        if name not in mine:
            raise UserError(f"{where}: has trained {name}, which this run does not train: it is of another model, or "
                            "the parameter is frozen now; start with train.init_from")


def holdings(engine: Engine) -> Iterator[Holding]:
    """What this rank's optimizer holds, read from the live engine."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    if engine.stage == 0:
        for group in engine.ds.optimizer.param_groups:
            for parameter in group["params"]:
                yield Holding(parameter, (Fragment(names[id(parameter)], 0, parameter.numel(), 0),))
    elif engine.stage == 3:
        yield from _sub_groups(engine.ds.optimizer, names)
    else:
        yield from _flat_groups(engine.ds.optimizer, names)


def _flat_groups(zero: Any, names: dict[int, str]) -> Iterator[Holding]:
    """Stages 1 and 2: one flat tensor a parameter group; a parameter may begin or end on another rank."""
    for master, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        mapped = [(names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        yield Holding(master, tuple(Fragment(name, here.lp_fragment_address.start, here.lp_fragment_address.numel,
                                             here.hp_fragment_address.start) for name, here in mapped))


def _sub_groups(zero: Any, names: dict[int, str]) -> Iterator[Holding]:
    """Stage 3: an equal share of every parameter; those of the last ranks may be shorter, or padding altogether."""
    for master, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        fragments, at = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = min(zero._get_param_partition_rank(parameter) * share, parameter.ds_numel)
            own = min(share, parameter.ds_numel - start)
            if own:
                fragments.append(Fragment(names[id(parameter)], start, own, at))
            at += share
        yield Holding(master, tuple(fragments))
