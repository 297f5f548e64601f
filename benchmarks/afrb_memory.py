"""Peak memory of a rank that trains AFRB on needles, from 512 to 8192 tokens: small backbone, frozen, attention off.

Two ranks, ZeRO-2 and ZeRO-3, activation checkpointing, fp32, one example a rank at a time; RSS beyond the imports.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from benchmarks.estimate import RANKS, STEPS, peaks
from benchmarks.harness import write_results
from pretrain.config.load import load_run_config
from pretrain.config.plan import make_plan

LENGTHS = (512, 2048, 4096, 8192)
PRESETS = {"vector memory": "afrb-big-small", "matrix memory 640 x 256": "afrb-retrieve-2k-small"}
CHUNK = 128


def settings(length: int, stage: int, folder: str) -> list[str]:
    """The preset on so many tokens, on random weights, a few updates without evaluation."""
    return [f"runs_dir={folder}", f"data.source.ctx_chunks={length // CHUNK}", f"data.source.ctx_chunk_len={CHUNK}",
            "model.backbone.weights=null",
            "model.backbone.hf_config.max_position_embeddings=16384", f"train.length={STEPS} steps",
            "schedule={name: constant, warmup: null}", f"engine.zero_stage={stage}", "engine.precision=fp32",
            "engine.activation_checkpointing=true", "checkpoint.every=null",
            "eval={every: null, at_start: false, metric: val/loss}",
            f"batch.global_batch_size={RANKS}", "batch.micro_batch_size=1", "batch.gradient_accumulation_steps=1",
            "monitor.tensorboard=false", "monitor.progress=off", "monitor.log_every=1 steps"]


def measure(preset: str, length: int, stage: int) -> dict[str, Any]:
    """Bytes of the larger rank beyond its imports at the peak, and what `pretrain estimate` says."""
    with tempfile.TemporaryDirectory() as folder:
        sets = settings(length, stage, folder)
        config = load_run_config(preset, sets).config
        plan = make_plan(config, RANKS, precision="fp32", device="cpu")
        found = peaks(preset, sets, folder)
    return {"tokens": config.data.seq_len, "measured": max(figures["beyond"] for figures in found),
            "estimated": plan.memory.device_bytes}


def main() -> None:
    """All lengths, and how well a straight line goes through them."""
    results: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        for stage in (2, 3):
            rows = [measure(preset, length, stage) for length in LENGTHS]
            tokens, used = ([row[key] for row in rows] for key in ("tokens", "measured"))
            slope, base = np.polyfit(tokens, used, 1)
            off = max(abs(slope * t + base - u) / u for t, u in zip(tokens, used, strict=True))
            results[f"{name}, ZeRO-{stage}"] = {"rows": rows, "bytes_a_token": slope, "bytes_at_no_token": base,
                                                "largest_distance_from_the_line": off}
            print(f"{name}, ZeRO-{stage}: {base / 2**20:.0f} MiB + {slope / 2**10:.1f} KiB a token, at most {off:.1%} "
                  f"off; {[round(row['estimated'] / row['measured'], 2) for row in rows]} estimated over measured",
                  flush=True)
    write_results("afrb_memory", results)


if __name__ == "__main__":
    main()
