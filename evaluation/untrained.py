"""A config's model as training would find it before the first step: built, given its weights, calibrated."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.data.open import open_training
from pretrain.engine.consolidate import load_initial_weights
from pretrain.engine.distributed import World
from pretrain.engine.views import FamilyStartContext
from pretrain.models.base import BuildContext, Family, Hooks


def untrained(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """The model of `config` on `device`, in fp32 and eval mode, after what its hooks do before training.

    Raises UserError where weights or data that those need are not there.
    """
    family: Family = resolve(FAMILIES, config.model.family, "model.family")
    model = family.build(config.model, BuildContext(seed=config.seed, document_masking=config.data.document_masking))
    model = model.to(device).eval()
    hooks = family.hooks(config)
    missing = load_initial_weights(model, config.train.init_from, partitioned=False, supplied=hooks.supplies)
    if type(hooks).before_engine is not Hooks.before_engine:
        alone = World(rank=0, local_rank=0, size=1, device=device, control=None, store=dist.HashStore())
        data = open_training(config, config.batch.resolve(1))
        hooks.before_engine(FamilyStartContext(model, alone, False, data, missing))
    return model.eval()
