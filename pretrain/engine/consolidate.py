"""Whole fp32 weights out of a sharded checkpoint, or into a model before training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pretrain.engine.shards import open_shards
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.publish import MANIFEST, Manifest

_log = logging.getLogger("pretrain")


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters (fp32 masters; frozen ones as they are) and buffers of a checkpoint of any ZeRO stage, on the CPU.

    DeepSpeed's shards are pickles: they are read only after every file has been held to the checkpoint's manifest.
    Tied parameters appear under one of their names only. Raises DataCorruption naming the file that differs.
    """
    manifest = Manifest.read(checkpoint)
    problems = manifest.verify(checkpoint, level="full")
    if problems:
        raise DataCorruption(problems[0])
    shards = open_shards(checkpoint, manifest)
    weights = {name: shards.whole(name) for name in shards.places}
    extra = load_file(checkpoint / "extra.safetensors")
    for key, value in extra.items():
        kind, _, name = key.partition("/")
        if kind in ("parameter", "buffer"):
            weights[name] = value
    return weights


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest of the run that `path` is; None where it is neither."""
    if (path / MANIFEST).is_file() and CheckpointRef.parse(path) is not None:
        return path
    if (path / "checkpoints").is_dir():
        newest = RunFolder.open(path).read_pointer("latest") or next(iter(RunFolder.open(path).checkpoints()), None)
        return newest.path if newest else None
    return None


def weights_at(source: Path, key: str) -> dict[str, torch.Tensor]:
    """Whole weights by name of an export, a checkpoint or the newest one of a run, on the CPU.

    Raises UserError naming the config key where it is none of these, DataCorruption for a checkpoint that is not whole.
    """
    if not source.exists():
        raise UserError(f"{key}: {source} does not exist")
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return load_weights(checkpoint)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{key}: {source} is neither a run, a checkpoint nor an export with safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@torch.no_grad()
def load_initial_weights(model: PreTrainedModel, init_from: str | None, *, partitioned: bool,
                         supplied: Callable[[str], bool]) -> frozenset[str]:
    """Copy weights, and nothing else, from an export, a checkpoint or a run into a built model (`train.init_from`).

    Every parameter of the model must be there with its shape, but for those that the family's hooks have `supplied`
    another source for; their names are returned. What the model has no place for is told and left out. None: nothing.

    Raises UserError naming the first that is not there.
    """
    if init_from is None:
        return frozenset()
    from deepspeed.runtime.zero import GatheredParameters
    source = Path(init_from)
    weights = weights_at(source, "train.init_from")
    tied = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in weights}
    missing = set()
    for name, parameter in model.named_parameters():
        value = weights.get(tied.get(id(parameter), name))
        if value is None:
            if not supplied(name):
                raise UserError(f"train.init_from: {source} holds no {name}: it is of another model")
            missing.add(name)
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(value.shape) != shape:
            raise UserError(f"train.init_from: {name} is {tuple(value.shape)} in {source}, the model's is {shape}")
        with GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
            if not partitioned or torch.distributed.get_rank() == 0:
                parameter.copy_(value.to(parameter.dtype))
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name].to(buffer.dtype))
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    spare = sorted(weights.keys() - known)
    if spare:
        _log.warning("train.init_from: %s holds %d weights that this model has no place for, %s first; left out",
                     source, len(spare), spare[0])
    _log.info("weights taken from %s", source)
    return frozenset(missing)
