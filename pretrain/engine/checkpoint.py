"""Checkpoints: complete or invisible, and proven on load.

    step-N.fF/  manifest.json      every file with bytes and SHA-256; world, stage, dtype, k, step, fence
                deepspeed/         DeepSpeed's own shards (weights, moments)
                extra.safetensors  what DeepSpeed forgets: frozen parameters, buffers, tensors of the family's hooks
                state.json         cursor, counters, schedule, hooks' scalars
                rng-R.safetensors  random state of rank R
                probe.safetensors  one micro-batch;  probe.json: the figures the weights give on it, and where

Written aside as `.tmp-fF-step-N`, hashed by the rank that wrote, fsynced, then renamed by rank 0.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.engine import elastic, probe, rng
from pretrain.engine.build import Engine
from pretrain.engine.shards import PRIVATE, TAG
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import Manifest, fsync, hash_file, replace_dir, require_space, write_json_atomic

_RANK_FILE = re.compile(r"(?:zero_pp_rank_|rng-)(\d+)[_.]")
_log = logging.getLogger("pretrain")


@dataclass
class Snapshot:
    """Everything of a run beside DeepSpeed's part."""

    state: dict[str, Any]
    schedule: dict[str, Any]
    health: dict[str, Any]
    hooks: dict[str, Any]
    data_fingerprint: str
    probe_inputs: dict[str, torch.Tensor]
    controls: dict[str, float] = field(default_factory=dict)


def save(engine: Engine, folder: RunFolder, lease: Lease | None, snapshot: Snapshot) -> CheckpointRef:
    """Write and publish a checkpoint. Collective; returns it on every rank.

    Raises UserError before anything is written where the disk is too full.
    """
    world = engine.world
    step = int(snapshot.state["step"])
    temporary = world.on_main(lambda: folder.tmp_checkpoint(step, _held(lease).fence))

    def prepare() -> None:
        require_space(folder.checkpoints_dir, expected_bytes(engine))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    world.on_main(prepare)
    world.all_or_none(lambda: _write_parts(engine, temporary, snapshot))
    figures = probe.measure(engine, snapshot.probe_inputs, snapshot.controls)
    _write_shared(engine, temporary, snapshot, figures)
    world.barrier()
    hashes: dict[str, str] = {}
    for part in world.gather_objects(world.all_or_none(lambda: _hash_own(temporary, world.rank, world.size))):
        hashes.update(part)

    def publish() -> CheckpointRef:
        if not _held(lease).still_held():
            raise UserError(f"{folder.root}: another process took this run over; nothing more is written here")
        Manifest.collect(temporary, hashes, step=step, k=int(snapshot.state["k"]), fence=_held(lease).fence,
                         world=world.size, stage=engine.stage, dtype=engine.precision).write(temporary)
        ref = folder.final_checkpoint(step, _held(lease).fence)
        replace_dir(temporary, ref.path)
        folder.write_pointer("latest", ref)
        return ref

    return world.on_main(publish)


def _held(lease: Lease | None) -> Lease:
    """Rank 0 holds the lease of the run; the other ranks have none."""
    assert lease is not None
    return lease


def expected_bytes(engine: Engine) -> int:
    """Bytes a checkpoint takes on disk, over all ranks: weights in the training dtype, fp32 master and two moments."""
    trained = sum(_numel(p) for p in engine.model.parameters() if p.requires_grad)
    frozen = sum(_numel(p) for p in engine.model.parameters() if not p.requires_grad)
    weight = 4 if engine.precision == "fp32" else 2
    return trained * (weight + 12) + frozen * weight * 2 + 50_000_000


def _numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _write_parts(engine: Engine, temporary: Path, snapshot: Snapshot) -> None:
    """DeepSpeed's shards and this rank's random state."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    # Without partitions DeepSpeed notes no names: the optimizer's state is then told by the order of its parameters.
    ours = {} if engine.stage else {"optimizer_parameters": [[names[id(p)] for p in group["params"]]
                                                             for group in engine.ds.optimizer.param_groups]}
    engine.ds.save_checkpoint(str(temporary), tag=TAG, save_latest=False, client_state={PRIVATE: ours})
    save_file(rng.capture(), temporary / f"rng-{engine.world.rank}.safetensors")


@torch.no_grad()
def _collect_extra(engine: Engine, hooks: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Frozen parameters and buffers by name, and tensors of the hooks; on rank 0 (others take part in gathering)."""
    from deepspeed.runtime.zero import GatheredParameters
    extra: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            continue
        with GatheredParameters([parameter], enabled=engine.stage == 3):
            if engine.world.is_main:
                extra[f"parameter/{name}"] = parameter.detach().cpu().clone().contiguous()
    for name, buffer in engine.model.named_buffers():
        extra[f"buffer/{name}"] = buffer.detach().cpu().clone().contiguous()
    for name, value in hooks.items():
        if torch.is_tensor(value):
            extra[f"hook/{name}"] = value.detach().cpu().clone().contiguous()
    return extra


def _write_shared(engine: Engine, temporary: Path, snapshot: Snapshot, figures: Mapping[str, float]) -> None:
    """What belongs to no rank, written by rank 0; all ranks take part in gathering frozen parameters."""
    extra = _collect_extra(engine, snapshot.hooks)
    proof = {"figures": {k: float.hex(v) for k, v in figures.items()}, "hardware": probe.hardware(engine),
             "controls": snapshot.controls}
    engine.world.on_main(lambda: _write_main(temporary, snapshot, proof, extra))


def _write_main(temporary: Path, snapshot: Snapshot, proof: Mapping[str, Any],
                extra: dict[str, torch.Tensor]) -> None:
    save_file(extra, temporary / "extra.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in snapshot.probe_inputs.items()}, temporary / "probe.safetensors")
    write_json_atomic(temporary / "probe.json", proof)
    scalars = {k: v for k, v in snapshot.hooks.items() if not torch.is_tensor(v)}
    write_json_atomic(temporary / "state.json", {
        "state": snapshot.state, "schedule": snapshot.schedule, "health": snapshot.health, "hooks": scalars,
        "data_fingerprint": snapshot.data_fingerprint})


def _hash_own(temporary: Path, rank: int, world_size: int) -> dict[str, str]:
    """Flush and hash the files this rank wrote; rank 0 also takes what belongs to no rank."""
    mine = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        match = _RANK_FILE.search(path.name)
        owner = int(match.group(1)) % world_size if match else 0
        if owner == rank:
            fsync(path)
            mine[path.relative_to(temporary).as_posix()] = hash_file(path)
    return mine


@torch.no_grad()
def load(engine: Engine, ref: CheckpointRef, seed: int) -> Snapshot:
    """Load a verified checkpoint into a fresh engine and prove it on the stored batch. Collective.

    World size, ZeRO stage and precision may be others than those that wrote it. Raises UserError where it is of another
    model, DataCorruption where the loaded weights do not reproduce the stored figures.
    """
    manifest = Manifest.read(ref.path)
    world = engine.world
    same_layout = _announce(engine, manifest, ref)
    elastic.restore(engine, ref.path, manifest)
    hook_tensors = _restore_extra(engine, ref.path)
    kept = stored(ref)
    inputs = load_file(ref.path / "probe.safetensors")
    saved = json.loads((ref.path / "probe.json").read_text())
    figures = probe.measure(engine, inputs, saved["controls"])
    exact = same_layout and saved["hardware"] == probe.hardware(engine)
    probe.compare({k: float.fromhex(v) for k, v in saved["figures"].items()}, figures, exact=exact,
                  precisions=(manifest.dtype, engine.precision), where=str(ref.path))
    if manifest.world == world.size:
        rng.restore(load_file(ref.path / f"rng-{world.rank}.safetensors"))
    else:
        rng.seed_all(seed, world.rank, manifest.k)
    return Snapshot(kept["state"], kept["schedule"], kept["health"], {**kept["hooks"], **hook_tensors},
                    kept["data_fingerprint"], inputs, saved["controls"])


def stored(ref: CheckpointRef) -> dict[str, Any]:
    """`state.json` of a verified checkpoint: what of a Snapshot is no tensor."""
    found: dict[str, Any] = json.loads((ref.path / "state.json").read_text())
    return found


def _announce(engine: Engine, manifest: Manifest, ref: CheckpointRef) -> bool:
    """Log what differs between the run that wrote and this one. True where nothing does."""
    world = engine.world
    written = f"world size {manifest.world}, ZeRO stage {manifest.stage}, {manifest.dtype}"
    here = f"world size {world.size}, ZeRO stage {engine.stage}, {engine.precision}"
    if world.is_main and written != here:
        _log.info("%s was written at %s; its weights and optimizer state are taken over at %s", ref.path, written, here)
    if world.is_main and manifest.world != world.size:
        _log.info("random generators of %d ranks do not fit %d: they are seeded from (seed, rank, batch %d), and "
                  "dropout differs from an undisturbed run's", manifest.world, world.size, manifest.k)
    if world.is_main and manifest.dtype != engine.precision:
        _log.warning("precision changes from %s to %s: losses go on near the former ones, not equal to them",
                     manifest.dtype, engine.precision)
    return written == here


def _restore_extra(engine: Engine, path: Path) -> dict[str, torch.Tensor]:
    """Put frozen parameters and buffers back, one at a time; returns the hooks' tensors."""
    from deepspeed.runtime.zero import GatheredParameters
    with safe_open(path / "extra.safetensors", framework="pt") as extra:
        keys = set(extra.keys())
        for name, parameter in engine.model.named_parameters():
            if parameter.requires_grad:
                continue
            if f"parameter/{name}" not in keys:
                raise DataCorruption(f"{path / 'extra.safetensors'}: holds no frozen parameter {name}")
            with GatheredParameters([parameter], modifier_rank=0, enabled=engine.stage == 3):
                if engine.stage != 3 or engine.world.is_main:
                    parameter.data.copy_(extra.get_tensor(f"parameter/{name}"))
        for name, buffer in engine.model.named_buffers():
            if f"buffer/{name}" in keys:
                buffer.data.copy_(extra.get_tensor(f"buffer/{name}"))
        return {key.removeprefix("hook/"): extra.get_tensor(key) for key in keys if key.startswith("hook/")}
