"""Building transformers models the same way on every rank, device and ZeRO stage."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from pretrain.models.base import BuildContext


def build_seeded(cls: type[PreTrainedModel], config: PreTrainedConfig, ctx: BuildContext) -> PreTrainedModel:
    """A freshly initialised model. The random state of the caller is left as it was.

    Weights are drawn on the CPU, so they do not depend on the device. `_from_config` is transformers' own way in:
    under ZeRO-3 with a live `HfDeepSpeedConfig` it partitions each module as it is built and then initialises the
    gathered weights (on `deepspeed.zero.Init` alone the initialisation would run on empty tensors and be lost).
    """
    on_meta = ctx.device.type == "meta"
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(ctx.seed)
        model = cls._from_config(config, dtype=ctx.dtype)
    if ctx.activation_checkpointing:
        # transformers 5 renames the method within its series.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if not on_meta and not is_deepspeed_zero3_enabled():
        model.to(ctx.device)
    return model
