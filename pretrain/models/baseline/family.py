"""The record of the baseline family."""

from __future__ import annotations

from transformers import PreTrainedModel

from pretrain.config.run import OptimConfig
from pretrain.models.base import BuildContext, Family, ParamGroup
from pretrain.models.baseline.model import BaselineEncoder, BaselineForCausalLM, hf_config, native_model
from pretrain.models.baseline.schema import BaselineConfig
from pretrain.models.build import build_seeded
from pretrain.models.groups import decay_groups


def build(cfg: BaselineConfig, ctx: BuildContext) -> PreTrainedModel:
    """A baseline with fresh weights."""
    cls = BaselineEncoder if cfg.kind == "encoder" else BaselineForCausalLM
    return build_seeded(cls, hf_config(cfg, document_masking=ctx.document_masking), ctx)


def parameter_groups(model: PreTrainedModel, optim: OptimConfig) -> list[ParamGroup]:
    """Matrices decay; biases, norms and embeddings do not."""
    return decay_groups(model, optim.weight_decay)


FAMILY = Family(
    name="baseline",
    schema=BaselineConfig,
    build=build,
    parameter_groups=parameter_groups,
    objectives=frozenset({"causal_lm", "contrastive"}),
    export=native_model,
)
