"""Schemas of data sources: where samples come from. The source itself is found through the registry by `kind`."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section


class SourceConfig(Section):
    """Base: `kind` picks the source."""

    changeable: ClassVar[frozenset[str]] = frozenset({"path", "verify"})
    """Keys that a run may change when it goes on: they say where the samples lie, not which they are."""

    kind: str = Field(description="which source; see pretrain/config/registry.py")

    def tokens_per_sample(self, seq_len: int) -> int:
        """Tokens of a sample, padding included; of most sources a window of `data.seq_len`."""
        return seq_len

    @property
    def fixed_seq_len(self) -> tuple[int, str] | None:
        """(tokens a sample, what they are made of) where the source decides that; None: `data.seq_len` does."""
        return None


def source_section(value: Any) -> Any:
    """Validate a source section as the class that its `kind` names; `kind` left out means shards."""
    from pretrain.config.registry import SOURCE_SCHEMAS, resolve
    if not isinstance(value, dict):
        return value
    return resolve(SOURCE_SCHEMAS, str(value.get("kind", "shards")), "data.source.kind").model_validate(value)


class ShardsConfig(SourceConfig):
    """Windows of a prepared dataset (a folder with manifest.json)."""

    kind: Literal["shards"] = "shards"
    path: str = Field(description="dataset folder written by `pretrain prep`")
    split: str = Field("train", description="split of the dataset")
    verify: Literal["full", "touch", "off", "auto"] = Field(
        "auto", description="full: hash all shards before the first step; touch: each at first use; auto: full to 2 GB")


class PairsConfig(SourceConfig):
    """Pairs of a prepared dataset: query, positive and negatives, padded."""

    kind: Literal["pairs"] = "pairs"
    path: str = Field(description="dataset folder written by `pretrain prep` from sources of pairs")
    split: str = Field("train", description="split of the dataset")
    query_length: int = Field(64, ge=2, le=1 << 20, description="tokens a query is cut to, special tokens included")
    passage_length: int = Field(256, ge=2, le=1 << 20, description="tokens a passage is cut to, the special ones too")
    negatives_per_query: int = Field(0, ge=0, le=64, description="negatives drawn for each pair")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the draw of negatives")
    verify: Literal["full", "touch", "off", "auto"] = Field(
        "auto", description="full: hash all shards before the first step; touch: each at first use; auto: full to 2 GB")

    def tokens_per_sample(self, seq_len: int) -> int:
        """The query, its positive and its negatives at full length."""
        return self.query_length + self.passage_length * (1 + self.negatives_per_query)


class SyntheticConfig(SourceConfig):
    """Samples without files, for tests, benchmarks and dry runs."""

    kind: Literal["synthetic"] = "synthetic"
    vocab_size: int = Field(1000, ge=2, description="ids are below this")
    samples: int = Field(1024, ge=1, description="windows in an epoch")
    pattern: Literal["random", "count"] = Field("random", description="count: the stream 0, 1, 2, ... mod vocab_size")
    seed: int = Field(0, ge=0, description="seed of the random ids")


class MixturePart(Section):
    """One source of a mixture."""

    weight: float = Field(gt=0, description="share of samples, relative to the other parts")
    source: SourceConfig = Field(description="samples of this part")

    @field_validator("source", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return source_section(value)


class MixtureConfig(SourceConfig):
    """Several sources, drawn in fixed proportion by a quota table of `period` places."""

    kind: Literal["mixture"] = "mixture"
    parts: list[MixturePart] = Field(min_length=1)
    period: int = Field(1000, ge=1, le=1_000_000, description="places of the quota table, the resolution of weights")

    def tokens_per_sample(self, seq_len: int) -> int:
        """Of the longest part; parts whose samples have other shapes are refused."""
        return max(part.source.tokens_per_sample(seq_len) for part in self.parts)


class OrderConfig(Section):
    """The global order of samples (C windows a chunk, G chunks a group, L lanes). Defaults are for local disks."""

    chunk_windows: int = Field(1, ge=1, description="windows read together (C); raise for object stores")
    group_chunks: int | None = Field(None, ge=1, description="chunks shuffled together (G); null: all of them")
    lanes: int = Field(1, ge=1, description="independent streams interleaved in a batch (L); divides the global batch")
    shuffle: bool = Field(True, description="false: samples in the order they were written")


class DataConfig(Section):
    """What the model is trained and validated on."""

    seq_len: int = Field(512, ge=2, le=1_048_576, description="tokens a sample")
    stride: int | None = Field(None, ge=1, description="tokens between window starts; null: seq_len")
    source: SourceConfig = Field(description="training samples")
    validation: SourceConfig | None = Field(None, description="null: split `val` of the same dataset, where it has one")
    order: OrderConfig = Field(default_factory=OrderConfig)
    document_masking: bool = Field(True, description="documents do not see each other; off in reference variants")
    workers: int = Field(0, ge=0, le=64, description="loader processes a rank; 0: read in the training process")
    prefetch: int = Field(2, ge=1, le=64, description="updates read ahead by each loader process")

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of a training sample, padding included."""
        return self.source.tokens_per_sample(self.seq_len)

    @field_validator("source", "validation", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return source_section(value)

    @model_validator(mode="after")
    def _length_of_the_source(self) -> DataConfig:
        """Take the length of a source that fixes it; say so where another one was asked for."""
        fixed = self.source.fixed_seq_len
        if fixed is None or self.seq_len == fixed[0]:
            return self
        if "seq_len" in self.model_fields_set:
            logging.getLogger("pretrain").warning("data.seq_len: %d is taken as %d, the tokens of a sample of kind %s "
                                                  "(%s)", self.seq_len, fixed[0], self.source.kind, fixed[1])
        return self.model_copy(update={"seq_len": fixed[0]})
