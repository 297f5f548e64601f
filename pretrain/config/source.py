"""Schemas of data sources: where samples come from. The source itself is found through the registry by `kind`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section
from pretrain.errors import ConfigError


class SourceConfig(Section):
    """Base: `kind` picks the source."""

    changeable: ClassVar[frozenset[str]] = frozenset({"path", "verify"})
    """Keys that a run may change when it goes on: they say where the samples lie, not which they are."""

    kind: str = Field(description="which source; see pretrain/config/registry.py")

    def tokens_per_sample(self, seq_len: int) -> int:
        """Tokens of a sample, padding included; of most sources a window of `data.seq_len`."""
        return seq_len

    def scored_tokens(self, seq_len: int) -> int:
        """Tokens of a sample that have an answer, where the source says which (`readout_positions`)."""
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
    packing: Literal["none", "best_fit"] = Field("none", description="none: windows of the token stream; best_fit: "
                                                 "whole documents by a plan of `pretrain data pack`")
    verify: Literal["full", "touch", "off", "auto"] = Field(
        "auto", description="full: hash all shards before the first step; touch: each at first use; auto: full to 2 GB")


class RemoteConfig(SourceConfig):
    """Windows of a prepared dataset that lies elsewhere; shards are fetched when they are first needed."""

    changeable: ClassVar[frozenset[str]] = frozenset({"url", "cache", "cache_bytes"})

    kind: Literal["remote"] = "remote"
    url: str = Field(pattern=r"^(https?://|pipe:).+", description="http(s) address of the dataset folder, or pipe: and "
                     "a command with {name} whose output is the file of that name")
    cache: str = Field(description="local folder that files are fetched to; one for each dataset")
    cache_bytes: int = Field(100_000_000_000, ge=1, description="shards kept there at most, in bytes")
    split: str = Field("train", description="split of the dataset")


class PairsConfig(SourceConfig):
    """Pairs of a prepared dataset: query, positive and negatives, padded."""

    kind: Literal["pairs"] = "pairs"
    path: str = Field(description="dataset folder written by `pretrain prep` from sources of pairs")
    split: str = Field("train", description="split of the dataset")
    query_length: int = Field(64, ge=2, le=1 << 20, description="tokens a query is cut to, special tokens included")
    passage_length: int = Field(256, ge=2, le=1 << 20, description="tokens a passage is cut to, the special ones too")
    negatives_per_query: int = Field(0, ge=0, le=64, description="negatives drawn for each pair")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the draw of negatives, in training and validation; the "
                      "run's own seed leaves them as they are")
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

    weight: float | None = Field(None, gt=0, description="share of samples, relative to the other parts; null: their "
                                 "number. Given for all parts or for none")
    source: SourceConfig = Field(description="samples of this part")

    @field_validator("source", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return source_section(value)


class CurriculumStage(Section):
    """Shares of the parts of a mixture for some time."""

    weights: list[float] = Field(min_length=1, description="share of samples of each part in this stage; 0: none")
    steps: int | None = Field(None, ge=1, description="batches the stage lasts; null: to the end, for the last one")


class MixtureConfig(SourceConfig):
    """Several sources, drawn in fixed proportion by a quota table of `period` places."""

    kind: Literal["mixture"] = "mixture"
    parts: list[MixturePart] = Field(min_length=1)
    period: int = Field(1000, ge=1, le=1_000_000, description="places of the quota table, the resolution of weights")
    temperature: float = Field(1.0, ge=0, le=10, description="shares go with this power of the weights: 0.5 flattens, "
                               "0 makes them equal")
    curriculum: list[CurriculumStage] = Field(default_factory=list, description="shares that change by step, in place "
                                              "of the parts' weights; each stage draws in an order of its own")

    @model_validator(mode="after")
    def _whole(self) -> MixtureConfig:
        """Weights for all parts or none, stages for all parts and all of the run."""
        given = [number for number, part in enumerate(self.parts) if part.weight is not None]
        if given and (self.curriculum or len(given) < len(self.parts)):
            other = next((n for n in range(len(self.parts)) if n not in given), given[0])
            raise ConfigError(f"parts.{other}.weight", "the curriculum states the shares; leave it out"
                              if self.curriculum else "give every part a weight, or none to go by their numbers")
        for number, stage in enumerate(self.curriculum):
            key, last = f"curriculum.{number}", number == len(self.curriculum) - 1
            if len(stage.weights) != len(self.parts) or min(stage.weights) < 0 or max(stage.weights) == 0:
                raise ConfigError(f"{key}.weights", f"{stage.weights}: one for each of the {len(self.parts)} parts, "
                                  "0 or more, not all 0")
            if (stage.steps is None) != last:
                raise ConfigError(f"{key}.steps", "the last stage goes to the end of the run" if last
                                  else "say how many batches the stage lasts")
        return self

    def shares(self, sizes: Sequence[int | None]) -> list[list[float]]:
        """Weights of the parts in each stage, one stage without a curriculum; `sizes` are their numbers of samples.

        Raises ConfigError where a part without end has no weight.
        """
        if self.curriculum:
            return [[weight and weight**self.temperature for weight in stage.weights] for stage in self.curriculum]
        weights = [size if part.weight is None else part.weight for part, size in zip(self.parts, sizes, strict=True)]
        endless = next((number for number, weight in enumerate(weights) if weight is None), None)
        if endless is not None:
            raise ConfigError(f"data.source.parts.{endless}.weight", "this source has no end; give every part a weight")
        return [[float(weight or 0)**self.temperature for weight in weights]]

    def tokens_per_sample(self, seq_len: int) -> int:
        """Of the longest part; parts whose samples have other shapes are refused."""
        return max(part.source.tokens_per_sample(seq_len) for part in self.parts)

    def scored_tokens(self, seq_len: int) -> int:
        """Of the part that has most."""
        return max(part.source.scored_tokens(seq_len) for part in self.parts)


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
