"""Cases of Spectra and its objectives in the engine: run at several world sizes and compared across them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.config import registry
from pretrain.config.source import SourceConfig
from pretrain.data.batch import Batch
from pretrain.engine.consolidate import load_weights
from pretrain.engine.distributed import World
from pretrain.monitor.writers import read_metrics
from pretrain.runfolder.layout import RunFolder
from tests.engine.feature_cases import Lines
from tests.engine.running import finish, run, start
from tests.engine.world import main

VOCAB, TQ, TP = 64, 16, 24


class ToyPairsConfig(SourceConfig):
    kind: Literal["toy_pairs"] = "toy_pairs"
    samples: int = 64


class ToyPairs:
    """Pairs whose query is a part of its passage, with one negative; some share their query with the next."""

    def __init__(self, samples: int) -> None:
        self.samples, self.vocab_size = samples, VOCAB
        self.fingerprint = f"toy-pairs-{samples}"

    def __len__(self) -> int:
        return self.samples

    def get(self, sample_ids: np.ndarray) -> Batch:
        rows = [self._row(int(i)) for i in sample_ids]
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)),
                     {name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, sample: int) -> dict[str, torch.Tensor]:
        draw = np.random.default_rng([3, sample])
        passage, other = (draw.integers(2, VOCAB, draw.integers(10, TP)) for _ in range(2))
        query = passage[draw.permutation(len(passage))[:draw.integers(5, 10)]]
        q, p, n = (self._padded(text, width) for text, width in ((query, TQ), (passage, TP), (other, TP)))
        return {"query_input_ids": q[0], "query_attention_mask": q[1], "positive_input_ids": p[0],
                "positive_attention_mask": p[1],
                "negative_input_ids": n[0][None], "negative_attention_mask": n[1][None],
                "negative_mask": torch.tensor([sample % 5 != 0]), "negative_ids": torch.tensor([sample + 10_000]),
                "query_ids": torch.tensor(sample // 2 if sample % 8 < 2 else sample + 1000),
                "passage_ids": torch.tensor(sample + 5000)}

    @staticmethod
    def _padded(text: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = np.zeros(width, np.int64)
        row[:len(text)] = text
        return torch.from_numpy(row), torch.arange(width) < len(text)


def open_toy_pairs(config: ToyPairsConfig, data: Any) -> ToyPairs:
    return ToyPairs(config.samples)


registry.SOURCE_SCHEMAS["toy_pairs"] = "tests.engine.spectra_cases:ToyPairsConfig"
registry.SOURCES["toy_pairs"] = "tests.engine.spectra_cases:open_toy_pairs"

MODEL: dict[str, Any] = {
    "family": "spectra", "size": None, "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
    "ffn_inner": 40, "spectral_dim": 12, "max_length": 24, "max_positions": 32, "dropout": 0.0, "sem_dims": [32, 24],
    "ent_dims": [24, 12], "anchor_dim": 8, "retrieval_dim": 16, "ranking_dim": 32, "anomaly_basis": 4}
BERT = {"family": "baseline", "body": "bert", "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
        "intermediate_size": 40, "max_position_embeddings": 32}
LOSSES = {"loss_weight_sem": [0.5, 0.5]}
STEPS = 4


def sections(model: dict[str, Any] | None = None, objective: dict[str, Any] | None = None,
             **engine: Any) -> dict[str, Any]:
    """Config of a run of 4 updates of 8 triplets, two of them at a time."""
    return {"model": {**MODEL, **(model or {})},
            "objective": {"name": "contrastive", **LOSSES, **(objective or {})},
            "data": {"seq_len": 24, "source": {"kind": "toy_pairs", "samples": 64}},
            "batch": {"global_batch_size": 8, "micro_batch_size": 2}, "engine": engine,
            "optim": {"lr": 2e-3}, "train": {"length": f"{STEPS} steps"}, "schedule": {"warmup": "2 steps"}}


def figures(world: World, folder: Path, name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient norm of every update, the last row, and the file of the first update's gradients."""
    trainer = start(world, folder, name, **parts)
    engine, apply, file = trainer.engine, trainer.engine.step, folder / f"{name}-gradients.safetensors"

    def step(lr: float) -> Any:
        if not trainer.state.step:
            grads = {key: (p.grad if engine.stage == 0 else safe_get_full_grad(p)).float().cpu().contiguous().clone()
                     for key, p in engine.model.named_parameters()}
            world.on_main(lambda: save_file(grads, file))
        return apply(lr)
    engine.step = step  # type: ignore[method-assign]
    trainer.train()
    losses = finish(trainer)
    rows = [row for row in read_metrics(RunFolder(folder / "runs" / name)) if row.get("loss") is not None]
    return {"losses": losses, "norms": [row["grad_norm"] for row in rows], "last": rows[-1], "gradients": str(file)}


def contrastive(world: World, folder: Path) -> dict[str, Any]:
    """All losses of Spectra, every stage, and the ways that must not change them."""
    found = {str(stage): figures(world, folder, f"stage{stage}", sections(zero_stage=stage)) for stage in (0, 2, 3)}
    if world.size > 2:
        return found
    uncached = sections(objective={"grad_cache": False}, zero_stage=2, activation_checkpointing=True)
    found["recomputed, uncached"] = figures(world, folder, "uncached", uncached)
    found["uncached, stage 3"] = figures(world, folder, "uncached3",
                                         sections(objective={"grad_cache": False}, zero_stage=3))
    for stage in (0, 2, 3):  # several contrastive batches an update, each carried backward before the next is formed
        published = sections({"profile": "compat"}, {"profile": "compat"}, zero_stage=stage)
        found[f"compat {stage}"] = figures(world, folder, f"compat{stage}", published)
    trainer = start(world, folder, "init", **sections(zero_stage=3, zero3_init="on", activation_checkpointing=True))
    read = trainer.engine.read
    spread = {name: read(name).std().item() for name, _ in trainer.engine.model.named_parameters() if _.ds_numel > 99}
    gates = {name: read(f"trunk.blocks.0.{name}").tolist() for name in ("spectral.theta", "attention.w_frac")}
    trainer.train()
    found["partitioned while built"] = {"std": spread, "gates": gates, "losses": finish(trainer)}
    return found


def baseline(world: World, folder: Path) -> dict[str, Any]:
    """The same objective on a BERT, which has none of these heads."""
    parts = sections(zero_stage=2)
    parts["model"] = BERT
    return figures(world, folder, "bert", parts)


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Undisturbed against stopped after 2 updates and gone on with, dropout on."""
    found: dict[str, Any] = {}
    for stage, precision in ((2, "fp32"), (3, "bf16")):
        parts = sections({"dropout": 0.2}, zero_stage=stage, precision=precision)
        whole = run(world, folder, f"whole-{stage}-{precision}", **parts)
        for stop in (2, STEPS):
            trainer = start(world, folder, f"parts-{stage}-{precision}", **parts)
            begin = trainer.state.step
            while trainer.state.step < stop:
                trainer.step()
            trainer._save()
            halves = finish(trainer)
        found[f"{stage}-{precision}"] = {"whole": whole, "parts": halves, "begin": begin}
    return found


def not_finite(world: World, folder: Path) -> dict[str, Any]:
    """A head of one rank gives NaN in batches 1 and 2."""
    found: dict[str, Any] = {}
    for stage in (2, 3):
        trainer = start(world, folder, f"stage{stage}", **sections(zero_stage=stage))
        moved = []
        with Lines() as lines:
            while (k := trainer.state.k) < 4:
                handle = None
                if k in (1, 2) and world.rank == world.size - 1:
                    head = trainer.engine.model.heads.retrieval
                    handle = head.register_forward_hook(lambda module, args, out: out * float("nan"))
                before = _fingerprint(trainer)
                trainer.step()
                if handle is not None:
                    handle.remove()
                moved.append(_fingerprint(trainer) != before)
        kept, told = trainer.keeper.folder.nonfinite_dir, [line for line in lines if "[NaN DEBUG]" in line]
        world.barrier()
        found[str(stage)] = {"step": trainer.state.step, "moved": moved, "skipped": trainer.health.bad_steps.skipped,
                             "ranks": world.size, "explained": [line for line in told if kept.name not in line],
                             "kept": {path.name: _kept(path) for path in kept.iterdir()}}
        finish(trainer)
    return found


def _fingerprint(trainer: Any) -> str:
    """Of every bit of every weight. Collective."""
    digest = hashlib.sha256()
    for name, _ in trainer.engine.model.named_parameters():
        digest.update(trainer.engine.read(name).numpy().tobytes())
    return digest.hexdigest()


def _kept(path: Path) -> dict[str, Any]:
    """What a file of a batch that was not finite holds."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        fed = ToyPairs(64).get(file.get_tensor("micro-1/passage_ids").numpy() - 5000).tensors
        return {"about": about, "generator": file.get_tensor("rng/torch").numel(),
                "sample_ids": file.get_tensor("micro-1/sample_ids").tolist(),
                "as_fed": all(torch.equal(file.get_tensor(f"micro-1/{name}"), value) for name, value in fed.items())}


def masked_lm(world: World, folder: Path) -> dict[str, Any]:
    """Losses of the masked LM, and a Spectra that begins with its trunk."""
    found: dict[str, Any] = {}
    hidden = {"name": "masked_lm", "mask_id": 1, "special_ids": [0], "vocab_size": VOCAB}
    for stage in (2, 3):
        parts = sections({"task": "masked_lm"}, zero_stage=stage)
        parts["objective"] = hidden
        found[str(stage)] = figures(world, folder, f"stage{stage}", parts)
    if world.size > 2:
        return found
    teacher = folder / "runs" / "stage2"
    weights = load_weights(RunFolder(teacher).checkpoints()[0].path)
    for stage, init in ((2, "off"), (3, "on")):
        model = {"trunk_init": str(teacher)}
        trainer = start(world, folder, f"pupil{stage}", **sections(model, zero_stage=stage, zero3_init=init))
        names = [name for name, _ in trainer.engine.model.named_parameters()]
        off = {name: float((trainer.engine.read(name) - weights[name]).abs().max())
               for name in names if name.startswith("trunk.")}
        found[f"pupil {stage}"] = {"largest": max(off.values()), "weights": len(off), "step": trainer.state.step}
        finish(trainer)
    return found


CASES = {"spectra_contrastive": contrastive, "spectra_masked_lm": masked_lm}
"""Of every world."""
SMALL_CASES = {**CASES, "spectra_baseline": baseline, "spectra_resume": resume, "spectra_not_finite": not_finite}
"""Of one and two ranks."""

if __name__ == "__main__":
    main(SMALL_CASES)
