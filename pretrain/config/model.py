"""The base of every family's schema: what the engine and the estimates may ask of a model without importing torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config.objective import ObjectiveConfig

LOSS_CHUNK_BYTES = 256 * 2**20
"""Logits that a language model's loss keeps alive at once; longer batches go through in chunks of this size."""


class Section(BaseModel):
    """Base of all config sections: unknown keys are errors, values are checked, fields are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class ParameterCount(BaseModel):
    """Exact counts in closed form, tied weights counted once."""

    total: int
    trainable: int


class ModelConfig(Section):
    """Base of a family's schema. A schema imports no torch; its counts are held to the built model by tests."""

    model_config = ConfigDict(protected_namespaces=())

    changeable: ClassVar[frozenset[str]] = frozenset()
    """Keys that a run may change when it goes on: they say how it trains, not what the model is."""

    no_fp16: ClassVar[str | None] = None
    """Why the family does not train in fp16; None: it does."""

    family: str = Field(description="which family builds this model; see pretrain/config/registry.py")
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer; null: the one of the data")

    @property
    @abstractmethod
    def kind(self) -> Literal["causal_lm", "encoder"]:
        """What the model's forward returns: sums over tokens, or a vector a text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the output table, or of the input table for an encoder."""

    @property
    @abstractmethod
    def max_seq_len(self) -> int | None:
        """Longest input in tokens, None where unlimited."""

    @abstractmethod
    def parameter_count(self) -> ParameterCount:
        """Exact number of parameters in closed form."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs a token: a multiply-add is 2, attention is the full T x T product. Training is 3x forward."""

    @abstractmethod
    def activation_bytes_per_token(self, seq_len: int, *, element_bytes: int, checkpointing: bool,
                                   scored: int | None = None) -> float:
        """Bytes of activations kept for the backward pass for one token of one sample (estimates only).

        `scored`: tokens of a sample that have a loss, None for all; families that compute less then may say so. Logits
        are left out: see `loss_bytes`.
        """

    def loss_bytes(self, tokens: int, *, element_bytes: int) -> int:
        """Peak bytes of logits and their gradient for a micro-batch with `tokens` that have a loss; an encoder has
        none.

        In one chunk, both live at once; in several, each chunk's gradient is written over its logits.
        """
        if self.kind == "encoder":
            return 0
        whole = tokens * self.vocab_size * element_bytes
        return 2 * whole if whole <= LOSS_CHUNK_BYTES else LOSS_CHUNK_BYTES

    @abstractmethod
    def tiny(self) -> ModelConfig:
        """The same architecture at a size that builds and steps in well under a second, for tests and smoke runs."""

    def with_vocab_size(self, vocab_size: int) -> ModelConfig:
        """A copy for a tokenizer of another size. Families whose vocabulary is fixed override this and refuse."""
        return self.model_copy(update={"vocab_size_": vocab_size})

    def objective_problems(self, objective: ObjectiveConfig) -> Iterator[ConfigError]:
        """What of this model the objective cannot train, and the other way round. The default finds nothing."""
        yield from ()

    def summary(self) -> dict[str, Any]:
        """Figures for `--dry-run` and model cards; families may add their own (claimed sizes, say)."""
        count = self.parameter_count()
        return {"family": self.family, "kind": self.kind, "parameters": count.total, "trainable": count.trainable}
