"""Checkpoints: complete or invisible, and proven on load.

    step-N.fF/  manifest.json      every file with bytes and SHA-256; world, stage, dtype, k, step, fence
                deepspeed/         DeepSpeed's own shards (weights, moments)
                extra.safetensors  what DeepSpeed forgets: frozen parameters, buffers, tensors of the family's hooks
                state.json         cursor, counters, schedule, hooks' scalars
                rng-R.safetensors  random state of rank R
                probe.safetensors  one micro-batch;  probe.json: the figures the weights give on it, and where

Written aside as `.tmp-fF-step-N` by a thread of every rank, hashed by the rank that wrote, fsynced, then renamed by
rank 0. Training waits for that, or goes on meanwhile with a copy of the state being written (`checkpoint.async_save`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.engine import elastic, probe, rng
from pretrain.engine.build import Engine
from pretrain.engine.capture import captured
from pretrain.engine.distributed import World
from pretrain.engine.shards import TAG
from pretrain.engine.writing import PartFile, TensorFile, TextFile, Writing, unwritable
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.hashing import Digest
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.publish import Manifest, json_text, replace_dir, require_space

_PATIENCE_S = 5.0
"""Seconds between two looks at who is still writing: a collective of its own would give up on a slow disk."""
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


class Saving:
    """A checkpoint on its way to the disk: every rank writes its part in a thread, and nobody can see it yet."""

    def __init__(self, world: World, folder: RunFolder, lease: Lease | None, temporary: Path, writing: Writing,
                 facts: Mapping[str, Any]) -> None:
        self._world = world
        self._folder = folder
        self._lease = lease
        self._temporary = temporary
        self._facts = facts
        self.writing = writing
        """This rank's part."""

    def publish(self) -> CheckpointRef:
        """Wait until every rank's part is written, and give the checkpoint its name. Collective; the same everywhere.

        Raises UserError where a disk did not take it in: then nothing of it is left.
        """
        while not self._world.agree(self.writing.wait(_PATIENCE_S)):
            pass
        failed, unwritten = self._world.reduce_ints([int(self.writing.failed), self.writing.unwritten])
        if failed:
            self.writing.explain(unwritten)
            self._world.on_main(self._discard)
        parts = self._world.gather_objects(self._world.all_or_none(self.writing.hashes))
        return self._world.on_main(lambda: self._name({name: own for part in parts for name, own in part.items()}))

    def _name(self, hashes: Mapping[str, Digest]) -> CheckpointRef:
        refuse_if_taken_over(self._folder, self._lease)
        fence = _held(self._lease).fence
        ref = self._folder.final_checkpoint(int(self._facts["step"]), fence)
        try:
            Manifest.collect(self._temporary, hashes, fence=fence, **self._facts).write(self._temporary)
            replace_dir(self._temporary, ref.path)
            refuse_if_taken_over(self._folder, self._lease)
            self._folder.write_pointer("latest", ref)
        except OSError as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            refuse_if_taken_over(self._folder, self._lease)  # whoever did has removed what was half-written
            raise unwritable(error) from None
        return ref

    def _discard(self) -> None:
        refuse_if_taken_over(self._folder, self._lease)
        shutil.rmtree(self._temporary, ignore_errors=True)


def refuse_if_taken_over(folder: RunFolder, lease: Lease | None) -> None:
    """Raise UserError where another process holds the run by now. Rank 0 only."""
    if not _held(lease).still_held():
        raise UserError(f"{folder.root}: another process took this run over; nothing more is written here")


def begin(engine: Engine, folder: RunFolder, lease: Lease | None, snapshot: Snapshot, *, to_host: bool) -> Saving:
    """Take the state as it is now and begin to write it. Collective.

    With `to_host` training may go on at once: the state is copied to host memory first. Without, nothing may change it
    before the checkpoint is published. Before anything is written it raises UserError where the disk is too full, and
    Divergence where the weights are not finite.
    """
    world = engine.world
    step = int(snapshot.state["step"])
    figures = probe.measure(engine, snapshot.probe_inputs, snapshot.controls)
    probe.require_finite(engine, figures, step)
    temporary = world.on_main(lambda: folder.tmp_checkpoint(step, _held(lease).fence))

    def prepare() -> None:
        require_space(folder.checkpoints_dir, expected_bytes(engine))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / TAG).mkdir(parents=True)
        except OSError as error:
            raise unwritable(error) from None

    world.on_main(prepare)
    files: list[PartFile] = list(world.all_or_none(lambda: captured(engine, temporary, to_host=to_host)))
    files.append(TensorFile(f"rng-{world.rank}.safetensors", rng.capture()))
    extra = _collect_extra(engine, snapshot.hooks)
    if world.is_main:
        files += _shared_files(engine, snapshot, figures, extra)
    facts = {"step": step, "k": int(snapshot.state["k"]), "world": world.size, "stage": engine.stage,
             "dtype": engine.precision}
    return Saving(world, folder, lease, temporary, Writing(temporary, files, beside=to_host), facts)


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


def _shared_files(engine: Engine, snapshot: Snapshot, figures: Mapping[str, float],
                  extra: dict[str, torch.Tensor]) -> list[PartFile]:
    """What belongs to no rank. Its text is made here: training goes on to change what it is made of."""
    proof = {"figures": {k: float.hex(v) for k, v in figures.items()}, "hardware": probe.hardware(engine),
             "controls": snapshot.controls}
    scalars = {k: v for k, v in snapshot.hooks.items() if not torch.is_tensor(v)}
    state = {"state": snapshot.state, "schedule": snapshot.schedule, "health": snapshot.health, "hooks": scalars,
             "data_fingerprint": snapshot.data_fingerprint}
    inputs = {k: v.cpu().contiguous() for k, v in snapshot.probe_inputs.items()}  # never changed after the first step
    return [TensorFile("extra.safetensors", extra), TensorFile("probe.safetensors", inputs),
            TextFile("probe.json", json_text(proof)), TextFile("state.json", json_text(state))]


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
