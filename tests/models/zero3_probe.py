"""Run by test_baseline_zero3.py in a process of its own: baselines under ZeRO-0 and ZeRO-3. Prints one JSON line."""

from __future__ import annotations

import json
import os
import sys

import deepspeed
import torch
from deepspeed.ops import __dict__ as ops
from transformers.integrations import HfDeepSpeedConfig

from pretrain.config.run import OptimConfig
from pretrain.models.base import BuildContext
from pretrain.models.baseline.family import FAMILY
from pretrain.models.baseline.schema import BaselineConfig
from pretrain.ops import cross_entropy

ROWS, T, V = 2, 40, 300


def config(body):
    return BaselineConfig(body=body, vocab_size=V, hidden_size=64, num_layers=2, num_heads=4,
                          max_position_embeddings=64)


def settings(stage):
    """Nothing stays gathered between uses, so that a weight read outside of its module's forward is empty."""
    return {"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                                  "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}


def train(body, stage, chunk_bytes, *, checkpointing=False):
    """Losses of three updates."""
    cross_entropy.LOSS_CHUNK_BYTES = chunk_bytes
    model = FAMILY.build(config(body), BuildContext(seed=3, activation_checkpointing=checkpointing)).train()
    groups = FAMILY.parameter_groups(model, OptimConfig())
    optimizer = torch.optim.AdamW([{"params": g.params, "weight_decay": g.weight_decay} for g in groups], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage),
                                      dist_init_required=False)
    generator, losses = torch.Generator().manual_seed(0), []
    documents = (torch.arange(T) > 17).long().expand(ROWS, T)
    for _ in range(3):
        ids = torch.randint(0, V, (ROWS, T + 1), generator=generator)
        out = engine(input_ids=ids[:, :-1], labels=ids[:, 1:], document_ids=documents)
        loss = out.nll_sum / out.n_tokens
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def spread(body):
    """Standard deviations of matrices that were partitioned as they were built, and sizes of the decay groups."""
    keep = HfDeepSpeedConfig(settings(3))
    model = FAMILY.build(config(body), BuildContext(seed=3))
    partitioned = [p.numel() == 0 for p in model.parameters()]
    found = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            if p.ndim == 2:
                found[name] = p.std().item()
    groups = {g.name: len(g.params) for g in FAMILY.parameter_groups(model, OptimConfig())}
    del keep
    return {"partitioned": all(partitioned), "std": found, "groups": groups}


if __name__ == "__main__":
    ops["__compatible_ops__"] = {}
    deepspeed.init_distributed("gloo")
    whole, small = 2**28, V * 4 * 16
    result = {body: {
        "reference": train(body, 0, whole),
        "stage3": train(body, 3, whole),
        "stage3 chunks": train(body, 3, small),
        "stage3 chunks checkpointing": train(body, 3, small, checkpointing=True),
        "spread": spread(body),
    } for body in ("llama", "gpt2")}
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)
