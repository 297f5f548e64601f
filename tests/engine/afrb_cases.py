"""Cases of AFRB that several ranks take part in."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evaluation.needle import NeedleEvaluator
from evaluation.phase import PhaseEvaluator
from pretrain.config.interval import Interval
from pretrain.engine.consolidate import find_checkpoint, load_weights
from pretrain.engine.distributed import World
from pretrain.errors import UserError
from pretrain.monitor.rows import read_metrics
from pretrain.ops.linear_recurrence import linear_recurrence
from tests.engine.running import finish, run, start


def sequence_parallel(world: World, folder: Path) -> dict[str, Any]:
    """States and gradients of one recurrence whose tokens lie on all ranks, every form of decay, resets, padding.

    Of the long one every 64th figure.
    """
    forms = {"token": (24, (2, 24)), "channel": (24, (3,)), "token and channel": (24, (2, 24, 3)),
             "32768 tokens": (32768, (2, 32768))}
    return {form: [x.flatten()[::64 if length > 24 else 1].tolist() for x in _recurrence(world, length, shape)]
            for form, (length, shape) in forms.items()}


def _recurrence(world: World, length: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """(states, gradients of inputs, decay and initial state), whole on every rank."""
    generator = torch.Generator().manual_seed(1)

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    w, a, initial = (x.requires_grad_() for x in (rand(2, length, 3) - 0.5, rand(*shape) ** (4.8 / length), rand(2, 3)))
    # Documents of about 20 tokens of 24, or 27,000 of 32,768: states cross the borders of ranks.
    resets, mask, pull = rand(2, length) < 1.2 / length, rand(2, length) > 0.1, rand(2, length, 3)
    share = length // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    states = linear_recurrence(w[:, own], a if a.ndim == 1 else a[:, own], initial=initial, resets=resets[:, own],
                               mask=mask[:, own], group=dist.group.WORLD).states
    (states * pull[:, own]).sum().backward()
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (w, a, initial)]
    for grad in grads:
        dist.all_reduce(grad)
    whole = torch.zeros(2, length, 3, dtype=torch.float64)
    whole[:, own] = states.detach()
    dist.all_reduce(whole)
    return [whole, *grads]


GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "initializer_range": 0.2}
LLAMA = {"model_type": "llama", "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    # Tied tables, two blocks with memory, a calibrated map that is frozen for two steps, frequencies that learn.
    "vector": {"family": "afrb", "backbone": {"hf_config": GPT2}, "n_afrb": 2, "enable_pvm": True, "disable_attn": True,
               "adaptive_omega": True, "layerscale_init": 0.1, "kiss_ridge_calib": True, "kiss_ridge_max_pairs": 64,
               "kiss_ridge_unfreeze_step": 2, "block_ramp": 2},
    # Attention kept, a memory of tokens with a write gate of learned marks and addresses of learned taps, corrected by
    # what it holds, its scale measured before the first step.
    "matrix": {"family": "afrb", "backbone": {"hf_config": LLAMA}, "enable_pvm": True, "pvm_memory": "matrix",
               "pvm_dk": 16, "pvm_dv": 8, "pvm_write_gate": True, "pvm_gate_marks": 4, "pvm_phase_clock": "learned",
               "pvm_rule": "delta", "layerscale_init": 0.1},
}
NEEDLES = {"seq_len": 41, "source": {"kind": "needle", "vocab_size": 96, "ctx_chunks": 2, "ctx_chunk_len": 16,
                                     "needle_len": 4, "needle_marker": "key", "pool_margin": 8}}
NOTHING_STAYS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                                       "stage3_max_reuse_distance": 0}}
"""Every weight is gathered for the forward of its own module only, so one that is read elsewhere is empty."""


def _sections(world: World, model: str, stage: int, **engine: Any) -> dict[str, Any]:
    extra = {"deepspeed": NOTHING_STAYS} if stage == 3 else {}
    return {"model": MODELS[model], "data": NEEDLES, "objective": {"name": "needle", "infonce_weight": 0.3},
            "batch": {"global_batch_size": 8, "gradient_accumulation_steps": 4 // world.size},
            "train": {"length": "4 steps"}, "schedule": {"name": "constant", "warmup": None},
            "engine": {"zero_stage": stage, **extra, **engine}}


def needles(world: World, folder: Path) -> dict[str, Any]:
    """Losses on needles for both kinds of memory and several stages; bf16 and activation checkpointing beside them."""
    found: dict[str, Any] = {}
    for model, stages in (("vector", (0, 3)), ("matrix", (0, 2, 3))):
        for stage in stages:
            found[f"{model} {stage}"] = run(world, folder, f"{model}-{stage}", **_sections(world, model, stage))
    found["matrix checkpointing"] = run(world, folder, "matrix-checkpointing", **_sections(
        world, "matrix", 3, activation_checkpointing=True))
    found["matrix bf16"] = run(world, folder, "matrix-bf16", **_sections(world, "matrix", 2, precision="bf16"))
    return found


def frozen_map(world: World, folder: Path) -> dict[str, Any]:
    """The readout map and what a resume keeps: calibrated once, frozen for two steps, then trained; tables whitened."""
    found: dict[str, Any] = {}
    for stage in (0, 3):
        trainer = start(world, folder, f"vector-{stage}", **_sections(world, "vector", stage))
        maps = [trainer.engine.read("readout.project")]
        for _ in range(3):
            trainer.step()
            maps.append(trainer.engine.read("readout.project"))
        trainer._save()
        finish(trainer)
        again = start(world, folder, f"vector-{stage}", **_sections(world, "vector", stage))
        resumed = again.engine.read("readout.project")
        calibrated = float(again.engine.model.calibrated)
        again.train()
        parts = finish(again)
        found[str(stage)] = {"moved": [not torch.equal(a, b) for a, b in itertools.pairwise(maps)],
                             "same": torch.equal(resumed, maps[-1]), "calibrated": calibrated, "losses": parts}
    return found


def finetuned(world: World, folder: Path) -> dict[str, Any]:
    """A new run from the weights of one with memory: its config names the family only, or one key otherwise."""
    teacher = folder.parent / "afrb_frozen_map" / "runs" / "vector-0"
    wanted = load_weights(find_checkpoint(teacher))
    rest = {"data": NEEDLES, "objective": {"name": "needle"}, "batch": {"global_batch_size": 8},
            "train": {"length": "2 steps", "init_from": str(teacher)}}
    found: dict[str, Any] = {}
    log = logging.getLogger("pretrain")
    level = log.level
    for name, model in (("bare", {}), ("otherwise", {"alpha": 0.5}),
                        ("less", {"enable_pvm": False, "readout_from": "none", "kiss_ridge_calib": False})):
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(f"{record.levelname} {record.getMessage()}")  # type: ignore
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        trainer = start(world, folder, name, model={"family": "afrb", **model}, **rest)
        log.setLevel(level)
        log.removeHandler(handler)
        cfg, engine = trainer.config.model, trainer.engine
        equal = all(torch.equal(engine.read(n), wanted[n].float()) for n, _ in engine.model.named_parameters())
        found[name] = {"blocks": cfg.n_afrb, "alpha": cfg.alpha, "pvm": cfg.enable_pvm, "step": trainer.state.step,
                       "equal": equal, "said": [line for line in said if "init_from" in line]}
        trainer.train()
        found[name]["losses"] = finish(trainer)
    try:
        start(world, folder, "misfit", model={"family": "afrb", "backbone": {"hf_config": LLAMA}}, **rest)
    except UserError as error:
        found["misfit"] = str(error)
    return found


def built_in_parts(world: World, folder: Path) -> dict[str, Any]:
    """Weights partitioned while they are built: initialised, whitened and calibrated all the same."""
    found = {}
    for model in MODELS:
        trainer = start(world, folder, model, **_sections(world, model, 3, zero3_init="on"))
        own = trainer.engine.model
        name = "readout.project" if model == "vector" else "memory.key"
        weight = trainer.engine.read(name).double()
        found[model] = {"spread": float(weight.std()), "parts": all(hasattr(p, "ds_id") for p in own.parameters())}
        if own.memory is not None:
            found[model] |= {"whitened": float((own.memory.output_rows.root - torch.eye(16)).abs().max()),
                             "orthogonal": float((weight @ weight.T - torch.eye(16)).abs().max()),
                             "scale": float(own.memory.log_scale.start.exp())}
        trainer.train()
        found[model]["losses"] = finish(trainer)
    return found


def evaluated(world: World, folder: Path) -> dict[str, Any]:
    """Figures of needles and phases at steps 0, 2 and 4; 21 examples, so that ranks hold rows that only fill up."""
    found: dict[str, Any] = {}
    for stage in (0, 3):
        sections = _sections(world, "matrix", stage)
        sections["data"] = {**NEEDLES, "source": {**NEEDLES["source"], "needle_eval_examples": 21}}
        sections["eval"] = {"every": "2 steps", "at_start": True, "metric": "val/needle_hit_rate"}
        every = Interval(2, "steps")
        trainer = start(world, folder, f"stage-{stage}", [NeedleEvaluator(every), PhaseEvaluator(every)], **sections)
        trainer.train()
        finish(trainer)
        rows = [row for row in read_metrics(trainer.keeper.folder) if "val/loss" in row]
        found[str(stage)] = {"steps": [row["step"] for row in rows],
                             "rows": [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows]}
    return found


EVERYWHERE = {"sequence_parallel": sequence_parallel, "afrb_needles": needles}
CASES = {**EVERYWHERE, "afrb_frozen_map": frozen_map, "afrb_built_in_parts": built_in_parts,
         "afrb_evaluated": evaluated, "afrb_finetuned": finetuned}
