"""Cases of AFRB at 2048 tokens: undisturbed runs, and the same runs killed and gone on with in another launch."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import set_seed

from pretrain.engine.distributed import World
from tests.engine.elastic_cases import advance
from tests.engine.running import finish, run, start
from tests.engine.world import main

WAYS = ((2, "fp32"), (3, "fp32"), (3, "bf16"))
SAVED, KILLED, STEPS = 2, 3, 4
"""The checkpoint stands at step 2, the ranks are killed after step 3, the run has 4."""
UNFREEZE = 3
"""Until this step the readout map is frozen, so that a resume stands between the two."""
WEIGHTS = "backbone"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "initializer_range": 0.1}


def write_backbone(folder: Path, seed: int) -> None:
    """Weights that no seed of a run would draw."""
    set_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).save_pretrained(folder)


def sections(weights: Path, stage: int, precision: str) -> dict[str, Any]:
    """Preset afrb-big on a small backbone: 2048 tokens and a question, attention off, memory, write gate, calibration.

    A high rate, and a block that is no identity at the start, so that every gate moves within two steps.
    """
    return {
        "model": {"family": "afrb", "backbone": {"weights": str(weights), "hf_config": LLAMA}, "enable_pvm": True,
                  "pvm_write_gate": True, "disable_attn": True, "layerscale_init": 0.1, "block_ramp": 4,
                  "kiss_ridge_calib": True, "kiss_ridge_max_pairs": 64, "kiss_ridge_unfreeze_step": UNFREEZE},
        "data": {"seq_len": 2069, "source": {"kind": "needle", "vocab_size": 512, "ctx_chunks": 16,
                                             "ctx_chunk_len": 128, "needle_marker": "key"}},
        "objective": {"name": "needle", "infonce_weight": 0.3},
        "batch": {"global_batch_size": 4, "gradient_accumulation_steps": 2},
        "train": {"length": f"{STEPS} steps"}, "schedule": {"name": "constant", "warmup": None},
        "engine": {"zero_stage": stage, "precision": precision, "activation_checkpointing": True}}


def undisturbed(world: World, folder: Path) -> dict[str, list[float]]:
    """Every way from the first step to the last."""
    weights = folder.parent.parent / WEIGHTS
    world.on_main(lambda: write_backbone(weights, 7) and None)
    return {f"{stage}-{precision}": run(world, folder, f"{stage}-{precision}", **sections(weights, stage, precision))
            for stage, precision in WAYS}


def killed(world: World, folder: Path) -> None:
    """Every way saves at step 2 and goes on to step 3; then both ranks are killed."""
    for stage, precision in WAYS:
        trainer = start(world, folder, f"{stage}-{precision}",
                        **sections(folder.parent.parent / WEIGHTS, stage, precision))
        advance(trainer, SAVED)
        while trainer.state.step < KILLED:
            trainer.step()
        trainer.loader.close()
        trainer.engine.release()
    world.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def gone_on(world: World, folder: Path) -> dict[str, Any]:
    """The same command in new processes; the folder of the backbone's weights holds other ones by now."""
    base = folder.parent.parent
    world.on_main(lambda: shutil.rmtree(base / WEIGHTS))
    world.on_main(lambda: write_backbone(base / WEIGHTS, 8) and None)
    found = {}
    for stage, precision in WAYS:
        trainer = start(world, base / "first" / "killed", f"{stage}-{precision}",
                        **sections(base / WEIGHTS, stage, precision))
        begun = trainer.state.step
        trainer.train()
        found[f"{stage}-{precision}"] = {"begun": begun, "losses": finish(trainer)}
    return found


CASES = {"first": {"undisturbed": undisturbed, "killed": killed}, "second": {"gone_on": gone_on}}

if __name__ == "__main__":
    main(CASES[Path(sys.argv[1]).name])
