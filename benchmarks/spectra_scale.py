"""The large Spectra on 2 CPU ranks: M1B built in parts, M456 training, each beside what it was expected to take.

- build: ZeRO-3 construction of spectra-m1b (2,388,144,384 parameters, no optimizer). Peak RSS above the imports, by
  rank, over the bytes of that rank's own parts. Run with --tiny for two blocks of it.
- train: 3 updates of spectra-m456 in bf16 with activation checkpointing at ZeRO-3, random pairs; peak RSS beside
  `pretrain estimate`, and the losses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.estimate import RANKS, STEPS, figures_of_ranks, peaks
from benchmarks.harness import write_results
from data_prep.manifest import Manifest, PairsRecord, write_manifest
from data_prep.pairs import PairWriter, TokenPair
from pretrain.config.load import load_run_config
from pretrain.config.machine import memory_bytes
from pretrain.config.plan import make_plan
from pretrain.config.registry import FAMILIES, resolve
from pretrain.monitor.memory import current_rss, peak_rss, reset_peak_rss

BUILD_GOAL, TRAIN_GOAL = 1.3, 0.15
LENGTH = 32


def build(sets: list[str], folder: Path) -> None:
    """One rank of the construction."""
    import deepspeed  # noqa: F401

    from pretrain.engine.build import build_model
    from pretrain.engine.distributed import join, shutdown
    from pretrain.engine.ranks import rank_environment
    own = rank_environment(os.environ)
    assert own is not None
    world = join(own, timeout_s=300.0, collective_s=3600.0)
    config = load_run_config("spectra-m1b", ["engine.zero_stage=3", "engine.zero3_init=on", *sets]).config
    family = resolve(FAMILIES, "spectra", "model.family")
    base = current_rss()
    reset_peak_rss()
    model, _, keepalive = build_model(config, family, config.batch.resolve(world.size), "fp32", world)
    parts = [p.ds_tensor for p in model.parameters()]
    figures = {"peak_above_base": peak_rss() - base, "base": base, "after": current_rss() - base,
               "share": sum(t.numel() * t.element_size() for t in parts),
               "whole": sum(p.ds_numel for p in model.parameters()), "dtype": str(parts[0].dtype),
               "std": float(torch.cat([t.flatten()[:1000].float() for t in parts if t.numel() > 1000]).std())}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(figures))
    del keepalive
    shutdown(0, world)


def pairs(folder: Path) -> None:
    """Random pairs of LENGTH tokens."""
    draw = np.random.default_rng(0)
    with PairWriter(folder, "train", dtype=np.dtype("<u2")) as writer:
        for number in range(64):
            query, positive = (draw.integers(5, 30_000, LENGTH - 1).astype("<u2") for _ in range(2))
            writer.push(TokenPair(query, positive, [], 2 * number, 2 * number + 1, [], [], {}), 8 * LENGTH)
    write_manifest(folder, Manifest(
        tokenizer_sha256=None, dtype="<u2", kind="pairs", block_tokens=0, eos_id=0, vocab_size=30_522, provenance={},
        pairs=PairsRecord(block_pairs=1024, prefix_ids=[], suffix_ids=[0], pad_id=1),
        splits={"train": writer.record}))


def training(folder: Path) -> list[str]:
    """Overrides of spectra-m456."""
    (folder / "data").mkdir()
    pairs(folder / "data")
    return [f"runs_dir={folder}", "name=scale", f"data.source.path={folder / 'data'}", f"data.seq_len={LENGTH}",
            f"data.source.query_length={LENGTH}", f"data.source.passage_length={LENGTH}",
            "data.source.negatives_per_query=0", "data.workers=0", f"train.length={STEPS} steps", "train.patience=null",
            "schedule.warmup=1 steps", "engine.zero_stage=3", "engine.precision=bf16",
            "engine.activation_checkpointing=true", "batch.micro_batch_size=2", "batch.gradient_accumulation_steps=2",
            "eval.every=null", "checkpoint.every=null", "monitor.tensorboard=false", "monitor.progress=off",
            "monitor.log_every=1 steps", "objective.grad_cache=true"]


def measure_build(sets: list[str]) -> dict[str, Any]:
    """Figures of both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = figures_of_ranks("benchmarks.spectra_scale", "build", json.dumps(sets), folder)
    ratio = max(figures["peak_above_base"] / figures["share"] for figures in ranks)
    return {"parameters": ranks[0]["whole"], "ranks": ranks, "peak over share": ratio, "goal": BUILD_GOAL}


def measure_training() -> dict[str, Any]:
    """Estimate and measured peak over both ranks, and the losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = training(folder)
        plan = make_plan(load_run_config("spectra-m456", sets).config, RANKS, precision="bf16", device="cpu")
        ranks = peaks("spectra-m456", sets, name)
        rows = [json.loads(line) for line in (folder / "scale" / "metrics.jsonl").read_text().splitlines()]
    estimated, measured = RANKS * plan.memory.device_bytes, sum(figures["beyond"] for figures in ranks)
    return {"estimated": estimated, "measured": measured, "ratio": estimated / measured, "goal": f"within {TRAIN_GOAL}",
            "phase": plan.memory.peak, "ranks": ranks, "terms": {t.name: t.bytes for t in
                                                                plan.memory.phases[plan.memory.peak]},
            "losses": [row["loss"] for row in rows if row.get("loss") is not None],
            "grad_norms": [row["grad_norm"] for row in rows if row.get("grad_norm") is not None]}


def main(chosen: list[str]) -> None:
    """Both, or the named one; results of the other are kept."""
    from benchmarks.harness import RESULTS
    path = RESULTS / "spectra_scale.json"
    found: dict[str, Any] = json.loads(path.read_text())["results"] if path.is_file() else {}
    found["machine_memory"] = memory_bytes()
    if "train" not in chosen:
        tiny = ["model.size=null", "model.hidden_size=2048", "model.num_layers=2", "model.num_heads=32",
                "model.ffn_inner=8192", "model.spectral_dim=512", "model.max_length=320"] if "--tiny" in chosen else []
        result = measure_build(tiny)
        print(f"build: {result['parameters']:,} parameters, peak {result['peak over share']:.3f} of a rank's share")
        if tiny:
            print(json.dumps(result, indent=1))
            return
        found["build spectra-m1b"] = result
    if "build" not in chosen:
        found["train spectra-m456"] = result = measure_training()
        print(f"train: estimated {result['estimated'] / 2**30:.2f} GiB, measured {result['measured'] / 2**30:.2f} GiB, "
              f"ratio {result['ratio']:.3f}; losses {result['losses']}")
    write_results("spectra_scale", found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"] and len(sys.argv) > 3:
        build(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
