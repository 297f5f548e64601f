"""Schemas of the training objectives. The objective itself is found through the registry by `name`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.model import Section
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config.run import ResolvedBatch
    from pretrain.config.source import DataConfig


class ObjectiveConfig(Section):
    """Base: `name` picks the objective."""

    protocol: ClassVar[Literal["sum", "update"]]
    name: str = Field(description="which objective; see pretrain/config/registry.py")

    def scored_tokens(self, data: DataConfig) -> int:
        """Tokens of a sample at which the model is asked for logits."""
        return data.seq_len

    def kept_tokens(self, data: DataConfig, batch: ResolvedBatch) -> int:
        """Tokens of a rank whose activations are kept at once, padding included."""
        return batch.micro_batch_size * data.seq_len


class InfoNCEConfig(ObjectiveConfig):
    """What objectives share that also contrast what a memory says with rows of the output table."""

    infonce_weight: float = Field(0.0, ge=0, le=1, description="weight of InfoNCE of what a memory says (family afrb); "
                                  "0 switches it off")
    infonce_negatives: int = Field(128, ge=1, le=256, description="ids drawn against the wanted token")
    infonce_tau: float = Field(0.08, ge=0.01, le=1, description="temperature of the cosines")


class CausalLMConfig(InfoNCEConfig):
    """Next-token cross-entropy over all tokens of the update, each token weighing the same."""

    protocol: ClassVar[Literal["sum", "update"]] = "sum"
    name: Literal["causal_lm"] = "causal_lm"
    z_loss: float = Field(0.0, ge=0, le=1, description="weight of the squared log-normaliser; 0 switches it off")
    infonce_positions: int = Field(64, ge=1, le=4096, description="tokens of each sample at which it is asked")
    infonce_seed: int = Field(0, ge=0, lt=1 << 63, description="key of the draw of tokens and negatives")


class MaskedLMConfig(ObjectiveConfig):
    """Cross-entropy of hidden tokens: of those chosen most are masked, some replaced by any token, some left alone.

    Which ones depends on the run's seed for it and the sample's place in the order alone.
    """

    protocol: ClassVar[Literal["sum", "update"]] = "sum"
    name: Literal["masked_lm"] = "masked_lm"
    mask_id: int = Field(103, ge=0, lt=1 << 24, description="id of the mask token")
    special_ids: tuple[int, ...] = Field((0, 100, 101, 102), description="ids that are never chosen and never put in "
                                         "another's place, beside mask_id: padding and the marks around a text")
    vocab_size: int = Field(30522, ge=2, le=1 << 24, description="tokens put in another's place are below this")
    rate: float = Field(0.15, gt=0, lt=1, description="share of tokens that are chosen")
    mask_share: float = Field(0.8, ge=0, le=1, description="share of the chosen that the mask token replaces")
    random_share: float = Field(0.1, ge=0, le=1, description="share of the chosen that any token replaces")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the draws")

    @model_validator(mode="after")
    def _shares(self) -> MaskedLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ConfigError("objective.random_share", f"{self.random_share} and objective.mask_share "
                              f"{self.mask_share} are more than 1 together")
        if len({*self.special_ids, self.mask_id} & set(range(self.vocab_size))) == self.vocab_size:
            raise ConfigError("objective.special_ids", "leave no token to put in another's place")
        return self


class NeedleObjectiveConfig(InfoNCEConfig):
    """Cross-entropy of the answer, InfoNCE of the readout against the output table, and a retrieval term."""

    protocol: ClassVar[Literal["sum", "update"]] = "sum"
    name: Literal["needle"] = "needle"
    lambda_retrieval: float = Field(0.0, ge=0, le=1, description="weight of a second cross-entropy of the answer; the "
                                    "same as the first unless legacy_loss")
    legacy_loss: bool = Field(False, description="that second one without the shift, as the original trained: it "
                              "teaches the model to repeat its own input (LEAK)")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the draw of negatives")

    def scored_tokens(self, data: DataConfig) -> int:
        """Those of the answer."""
        return data.source.scored_tokens(data.seq_len)

    @model_validator(mode="after")
    def _legacy(self) -> NeedleObjectiveConfig:
        if self.legacy_loss and not self.lambda_retrieval:
            raise ConfigError("objective.lambda_retrieval", "0 leaves objective.legacy_loss without weight; the "
                              "original's is 0.5")
        return self
