"""Chains of runs: each link goes on from what another world size and ZeRO stage saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.distributed import World
from pretrain.engine.trainer import Trainer
from pretrain.runfolder.publish import Manifest
from tests.engine.running import finish, start, write_config
from tests.engine.shared_cases import UNEVEN

TOY: dict[str, Any] = {"family": "toy", "width": 15, "vocab_size": 67, "hooked": True}
"""Odd sizes: no group and no parameter is a multiple of 2 or 4."""
LLAMA: dict[str, Any] = {"family": "baseline", "body": "llama", "vocab_size": 67, "hidden_size": 24, "num_layers": 2,
                         "num_heads": 3, "tie_embeddings": True}
LINK_STEPS = 10


def sections(model: dict[str, Any], precision: str, stage: int, length: int, micro_batch: int = 1) -> dict[str, Any]:
    """Config of a link; every world size accumulates another number of times."""
    return {"model": model, "data": UNEVEN, "batch": {"global_batch_size": 8, "micro_batch_size": micro_batch},
            "train": {"length": f"{length} steps"}, "checkpoint": {"keep_last": 9},
            "engine": {"zero_stage": stage, "precision": precision}}


def move_what_no_optimizer_holds(trainer: Trainer) -> None:
    """Give frozen weights and buffers values that a freshly built model does not have."""
    model = trainer.engine.model
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            trainer.engine.write(name, 1.5 * trainer.engine.read(name))
    if hasattr(model, "frequency"):
        model.frequency.mul_(1.25)


def advance(trainer: Trainer, stop: int) -> None:
    """Train to step `stop` and save there, even where nothing is new since the checkpoint that was loaded."""
    while trainer.state.step < stop:
        trainer.step()
    trainer.saved = None
    trainer._save()


def optimizer_facts(trainer: Trainer) -> dict[str, Any]:
    """Decay of every group and the step counts of this rank's states, with how many distinct objects they are."""
    optimizer = trainer.engine.ds.optimizer
    inner = optimizer if trainer.engine.stage == 0 else optimizer.optimizer
    steps = [state["step"] for state in inner.state.values()]
    return {"decay": [group["weight_decay"] for group in inner.param_groups], "steps": [float(s) for s in steps],
            "distinct": len({id(s) for s in steps})}


def begin(world: World, folder: Path, name: str, model: dict[str, Any], precision: str, stage: int, length: int,
          stop: int = LINK_STEPS) -> list[float]:
    """A fresh run to step `stop`, saved there; its losses."""
    trainer = start(world, folder, name, **sections(model, precision, stage, length))
    move_what_no_optimizer_holds(trainer)
    advance(trainer, stop)
    return finish(trainer)


def go_on(world: World, folder: Path, name: str, model: dict[str, Any], precision: str, stage: int, length: int,
          steps: int = LINK_STEPS, micro_batch: int = 1) -> dict[str, Any]:
    """Resume the run in `folder`, save at once (nothing but the layout may change), train on and save again."""
    trainer = start(world, folder, name, **sections(model, precision, stage, length, micro_batch))
    begun = trainer.state.step
    advance(trainer, begun)
    facts = world.gather_objects(optimizer_facts(trainer))
    advance(trainer, begun + steps)
    hooks = trainer.hooks.state_dict()
    losses = finish(trainer)
    return {"begun": begun, "root": str(trainer.keeper.folder.root), "losses": losses, "facts": facts,
            "calls": hooks.get("calls"), "decay": trainer.config.optim.weight_decay}


def chain_names(chains: Sequence[str]) -> list[tuple[str, dict[str, Any], str, list[int]]]:
    """Parse "toy-fp32-0-3-1": model, precision and the stage of every link."""
    parsed = []
    for chain in chains:
        model, precision, *stages = chain.split("-")
        parsed.append((chain, TOY if model == "toy" else LLAMA, precision, [int(s) for s in stages]))
    return parsed


CHAINS = ("toy-fp32-0-3-1", "toy-fp32-1-0-2", "toy-fp32-2-1-3", "toy-fp32-3-2-0", "toy-bf16-2-3-2", "toy-bf16-3-2-3",
          "llama-fp32-3-0-1")
LENGTH = 3 * LINK_STEPS


def first_link(world: World, folder: Path) -> dict[str, Any]:
    """The first ten steps of every chain."""
    return {name: begin(world, folder, name, model, precision, stages[0], LENGTH)
            for name, model, precision, stages in chain_names(CHAINS)}


def next_link(world: World, folder: Path, origin: str, link: int) -> dict[str, Any]:
    """Ten more steps of every chain that launch `origin` began, in its folder."""
    runs = folder.parents[1] / origin / "first_link"
    return {name: go_on(world, runs, name, model, precision, stages[link], LENGTH)
            for name, model, precision, stages in chain_names(CHAINS)}


def undisturbed(world: World, folder: Path) -> dict[str, Any]:
    """The chains' runs without an interruption, at one stage each."""
    found = {}
    for name, model, precision, stage in (("toy-fp32", TOY, "fp32", 0), ("toy-bf16", TOY, "bf16", 2),
                                          ("llama-fp32", LLAMA, "fp32", 0)):
        found[name] = {"losses": begin(world, folder, name, model, precision, stage, LENGTH, stop=LENGTH),
                       "root": str(folder / "runs" / name)}
    return found


def proof(world: World, folder: Path) -> dict[str, str]:
    """What a resume says of weights that give the stored figure up to its last bits, here and on other hardware."""
    from pretrain.engine import probe
    begin(world, folder, "run", TOY, "fp32", 2, LENGTH, stop=2)
    hardware, measure, said = probe.hardware, probe.measure, {}
    try:
        for where, factor in (("here", 1 + 1e-9), ("elsewhere", 1 + 1e-9), ("elsewhere, other weights", 1 + 1e-3)):
            probe.hardware = lambda engine, where=where: hardware(engine) if where == "here" else [where]  # type: ignore
            probe.measure = lambda *args, factor=factor: {  # type: ignore
                name: value * factor for name, value in measure(*args).items()}
            said[where] = attempt(world, folder, "run", sections(TOY, "fp32", 2, LENGTH))
    finally:
        probe.hardware, probe.measure = hardware, measure
    return said


def attempt(world: World, folder: Path, name: str, values: dict[str, Any]) -> str:
    """Start a run and end it at once; the error that came of it, or nothing."""
    from rich.console import Console

    from pretrain.config.load import load_run_config
    from pretrain.engine.claim import claim_run
    from pretrain.engine.setup import prepare
    world.on_main(lambda: write_config(folder, name, **values) and None)
    loaded = load_run_config(folder / f"{name}.yaml")
    claim = claim_run(loaded, world)
    message = ""
    try:
        trainer = prepare(loaded, world, claim, [], Console(quiet=True))
        trainer.loader.close()
        trainer.engine.release()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    if claim.lease is not None:
        claim.lease.release()
    world.barrier()
    return message


def interrupted(world: World, folder: Path) -> dict[str, Any]:
    """A resume that breaks off on the last rank in the middle of the copying; then the same resume without a fault."""
    from pretrain.engine.shards import Shards
    begin(world, folder, "run", TOY, "fp32", 2, LENGTH)
    checkpoint = folder / "runs" / "run" / "checkpoints" / f"step-{LINK_STEPS}.f1"
    before = {p: p.stat().st_mtime_ns for p in sorted(checkpoint.rglob("*"))}
    copy, calls = Shards.copy, []

    def failing(self: Shards, name: str, kind: Any, start: int, out: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) > 4 and world.rank == world.size - 1:
            raise OSError("planted")
        copy(self, name, kind, start, out)

    Shards.copy = failing  # type: ignore[method-assign]
    try:
        message = attempt(world, folder, "run", sections(TOY, "fp32", 3, LENGTH))
    finally:
        Shards.copy = copy  # type: ignore[method-assign]
    untouched = Manifest.read(checkpoint).verify(checkpoint) == [] and before == {
        p: p.stat().st_mtime_ns for p in sorted(checkpoint.rglob("*"))}
    trainer = start(world, folder, "run", **sections(TOY, "fp32", 3, LENGTH))
    step = trainer.state.step
    finish(trainer)
    return {"messages": world.gather_objects(message), "untouched": untouched, "step": step}
