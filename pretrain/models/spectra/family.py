"""The record of the Spectra family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.config.run import OptimConfig, RunConfig
from pretrain.errors import UserError
from pretrain.models.base import BuildContext, EngineStartContext, Family, Hooks, ParamGroup
from pretrain.models.build import build_seeded
from pretrain.models.spectra.hf_config import hf_config
from pretrain.models.spectra.model import SpectraForMaskedLM, SpectraModel
from pretrain.models.spectra.schema import SpectraConfig

TRUNK = "trunk."
GRAD_WARN = 100.0
"""Gradient norm that is worth a line in any run."""


def build(cfg: SpectraConfig, ctx: BuildContext) -> PreTrainedModel:
    """A model with fresh weights."""
    cls = SpectraForMaskedLM if cfg.task == "masked_lm" else SpectraModel
    return build_seeded(cls, hf_config(cfg), ctx)


def parameter_groups(model: PreTrainedModel, optim: OptimConfig) -> list[ParamGroup]:
    """Weights of linear layers decay; biases, norms, tables, gates and the basis do not (`model.decay_exclude`).

    The compat profile lets all of them decay, which pulls the gates to zero.
    """
    if not model.config.decay_exclude:
        return [ParamGroup("decay", [p for p in model.parameters() if p.requires_grad],
                           weight_decay=optim.weight_decay)]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = {id(p) for p in _linear_weights(model)} - tables
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [ParamGroup("decay", [p for p in parameters if id(p) in decayed], weight_decay=optim.weight_decay),
            ParamGroup("no_decay", [p for p in parameters if id(p) not in decayed])]


def _linear_weights(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    return (module.weight for module in model.modules() if isinstance(module, nn.Linear))


class SpectraHooks(Hooks):
    """Takes the trunk from a masked-LM at the start of a fresh run."""

    def __init__(self, trunk_init: str) -> None:
        self.trunk_init = trunk_init

    def before_engine(self, ctx: EngineStartContext) -> None:
        """Raises UserError naming the first weight of the trunk that is missing there or of another shape."""
        if self.trunk_init == "scratch":
            return
        source = Path(self.trunk_init)
        weights = ctx.weights(source, "model.trunk_init")
        for name, parameter in ctx.model.named_parameters():
            if not name.startswith(TRUNK):
                continue
            value = weights.get(name)
            if value is None:
                raise UserError(f"model.trunk_init: {source} holds no {name}: it is of another model")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(value.shape) != shape:
                raise UserError(f"model.trunk_init: {name} is {tuple(value.shape)} in {source}, the model's is {shape}")
            ctx.full_parameter(name, value.to(torch.float32))


def hooks(config: RunConfig) -> Hooks:
    """Hooks of a run."""
    assert isinstance(config.model, SpectraConfig)
    return SpectraHooks(config.model.trunk_init)


FAMILY = Family(
    name="spectra",
    schema=SpectraConfig,
    build=build,
    parameter_groups=parameter_groups,
    objectives=frozenset({"contrastive", "masked_lm"}),
    hooks=hooks,
    grad_warn=GRAD_WARN,
)
