"""Schema of the contrastive objective: the losses of the Spectra specification, for any encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.objective import ObjectiveConfig
from pretrain.config.source import DataConfig, PairsConfig
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config.run import ResolvedBatch

COMPAT: dict[str, Any] = {
    "spectral_reg": "sample", "ent_nce_weight": 0.0, "bridge_metric": "mse", "bridge_stopgrad": False,
    "gather_negatives": False, "nce_hard_negatives": False, "mask_false_negatives": False, "grad_cache": False,
    "contrastive_batch": "micro_batch",
}
"""Defaults of `profile: compat`."""


class ContrastiveConfig(ObjectiveConfig):
    """Contrast of pairs, gathered over ranks and with cached gradients.

    A term applies where the model has the heads it is about. An encoder without the heads of Spectra trains by
    symmetric InfoNCE on its default head.
    """

    protocol: ClassVar[Literal["sum", "update"]] = "update"
    name: Literal["contrastive"] = "contrastive"
    profile: Literal["corrected", "compat"] = Field("corrected", description="compat: the published losses, for "
                                                    "comparison only; sets the defaults of nine keys below")
    temperature_start: float = Field(0.07, gt=0, le=10, description="temperature of all InfoNCE terms, at first")
    temperature_end: float = Field(0.05, gt=0, le=10, description="at the last update; validation always uses it")
    temperature_hold_ratio: float = Field(0.2, ge=0, lt=1, description="share of the updates before the cosine fall")
    gather_negatives: bool = Field(True, description="contrast with the texts of all ranks")
    nce_hard_negatives: bool = Field(True, description="hard negatives of the whole batch are candidates of each query")
    mask_false_negatives: bool = Field(True, description="candidates that are the query's own by their ids are none")
    grad_cache: bool = Field(True, description="two passes over small chunks; false: one, whose activations of all "
                             "texts are kept")
    contrastive_batch: Literal["update", "micro_batch"] = Field(
        "update", description="what is contrasted: all triplets of an update, or each micro-batch by itself, averaged")
    enable_semantic_nce: bool = Field(True, description="InfoNCE of the semantic prefixes")
    enable_bridge: bool = Field(True, description="the short entity vector follows the short semantic one")
    enable_matry_angular: bool = Field(True, description="cosines of the retrieval vector follow the ranking vector's")
    nested_ranking: bool = Field(False, description="InfoNCE on prefixes of the ranking vector in place of the whole")
    nested_dims: tuple[int, ...] = Field((128, 256, 512, 768, 1536), min_length=1, description="their widths")
    nested_weights: tuple[float, ...] = Field((0.10, 0.15, 0.20, 0.25, 0.30), min_length=1, description="their weights")
    loss_weight_sem: tuple[float, ...] = Field((0.35, 0.30, 0.25), min_length=1, description="by semantic prefix")
    loss_weight_anchor: float = Field(0.15, ge=0, description="InfoNCE of the anchor vector")
    loss_weight_bridge: float = Field(0.02, ge=0, description="bridge; 0 switches it off")
    loss_weight_fast: float = Field(0.25, gt=0, description="InfoNCE and triplet of the retrieval vector")
    loss_weight_ranking: float = Field(1.0, gt=0, description="InfoNCE and triplet of the ranking vector")
    loss_weight_matryoshka: float = Field(0.08, ge=0, description="angular term; 0 switches it off")
    spectral_reg_weight: float = Field(0.005, ge=0, description="entropy of the spectral vector; 0 switches it off")
    spectral_reg: Literal["marginal", "sample", "off"] = Field(
        "marginal", description="entropy of the mean distribution over texts, the mean of each text's entropy, or none")
    ent_nce_weight: float = Field(0.10, ge=0, description="InfoNCE of the entity vector; 0 switches it off")
    triplet_margin: float = Field(0.3, ge=0, le=4, description="margin of the triplet terms")
    bridge_metric: Literal["cosine", "mse"] = Field("cosine", description="1 - cosine, or mean squared difference")
    bridge_stopgrad: bool = Field(True, description="the semantic side of the bridge is not pulled")

    @model_validator(mode="before")
    @classmethod
    def _compat(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("profile") == "compat":
            return {**COMPAT, **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ContrastiveConfig:
        if self.temperature_end > self.temperature_start:
            raise ConfigError("objective.temperature_end", f"{self.temperature_end} is above objective."
                              f"temperature_start {self.temperature_start}; the temperature only falls")
        if len(self.nested_dims) != len(self.nested_weights):
            raise ConfigError("objective.nested_weights", f"has {len(self.nested_weights)} weights for the "
                              f"{len(self.nested_dims)} widths of objective.nested_dims; give one for each")
        for key in ("loss_weight_sem", "nested_weights"):
            if any(w <= 0 for w in getattr(self, key)):
                raise ConfigError(f"objective.{key}", f"{getattr(self, key)}: every weight must be above 0")
        return self

    def kept_tokens(self, data: DataConfig, batch: ResolvedBatch) -> int:
        """A chunk of texts with caching; without, all texts that are contrasted with each other."""
        source = data.source
        if self.grad_cache or not isinstance(source, PairsConfig):
            return super().kept_tokens(data, batch)
        triplets = batch.micro_batch_size
        if self.contrastive_batch == "update":
            triplets *= batch.gradient_accumulation_steps
        if self.profile == "compat":  # all texts are padded alike
            return triplets * (2 + source.negatives_per_query) * max(source.query_length, source.passage_length)
        return triplets * data.tokens_per_sample

    @property
    def trains_semantic(self) -> bool:
        """Whether the semantic vector has a loss of its own."""
        return self.enable_semantic_nce
