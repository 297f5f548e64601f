"""Schemas of the training objectives. The objective itself is found through the registry by `name`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.config.model import Section


class ObjectiveConfig(Section):
    """Base: `name` picks the objective."""

    protocol: ClassVar[Literal["sum", "update"]]
    name: str = Field(description="which objective; see pretrain/config/registry.py")


class CausalLMConfig(ObjectiveConfig):
    """Next-token cross-entropy over all tokens of the update, each token weighing the same."""

    protocol: ClassVar[Literal["sum", "update"]] = "sum"
    name: Literal["causal_lm"] = "causal_lm"
    z_loss: float = Field(0.0, ge=0, le=1, description="weight of the squared log-normaliser; 0 switches it off")
