"""`PrepConfig`: one typed description of a dataset, from raw text to shards."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_prep.clean_config import CleanConfig, DecontaminateConfig, DedupConfig, TokenizerConfig
from data_prep.source_config import PAIR_SOURCES, AnySource, PairPresetSource, SourceBase
from pretrain.config.model import Section
from pretrain.errors import ConfigError

TRAIN = "train"
_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?(MB|GB)")


class PrepConfig(Section):
    """How a dataset is made. The same config and sources give the same bytes for any number of workers."""

    out: str = Field(description="dataset folder to write")
    sources: list[AnySource] = Field(min_length=1, description="read in this order")
    clean: CleanConfig = Field(default_factory=CleanConfig)
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig | None = Field(None, description="null: evaluation sets are not looked for")
    splits: dict[str, float] = Field(
        default_factory=lambda: {"val": 0.01},
        description="share of documents, by keyed hash of their text, for each split but train, which is the rest; "
                    "0: only what a source puts there")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    max_document_bytes: int = Field(64 << 20, ge=1, le=1 << 30, description="longer documents are set aside, not read")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of a source that may be unreadable; more of "
                                    "it ends preparation with code 3")
    block_tokens: int = Field(16384, ge=64, le=1 << 24, description="tokens a sample of the shards holds")
    block_pairs: int = Field(1024, ge=1, le=1 << 20, description="pairs a sample of the shards holds")
    blocks_per_shard: int | None = Field(None, ge=1, description="null: shards of about 64 MB")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the split and of the tokenizer's sample")
    workers: int | None = Field(None, ge=1, le=1024, description="processes; null: one a core")
    memory: str = Field("2 GB", description="of all processes together, as 500 MB or 4 GB; the result does not depend "
                        "on it")

    @field_validator("splits")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for name, share in value.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == TRAIN:
                raise ValueError(f'"{name}" cannot be given a share: use lower-case letters, digits and _; '
                                 f"{TRAIN} is what the others leave")
            if not 0 <= share < 1:
                raise ValueError(f"{name}: {share} must lie between 0 and 1")
        if sum(value.values()) >= 1:
            raise ValueError(f"the shares add up to {sum(value.values()):g}, which leaves nothing for {TRAIN}")
        return value

    @field_validator("memory")
    @classmethod
    def _size(cls, value: str) -> str:
        if not _MEMORY.fullmatch(value):
            raise ValueError(f'"{value}" is no size: a number and MB or GB, as 500 MB')
        return value

    @field_validator("sources")
    @classmethod
    def _unique_names(cls, value: list[SourceBase]) -> list[SourceBase]:
        names = [source.name for source in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'two sources are called "{twice[0]}"; give each its own name')
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> PrepConfig:
        other = next((i for i, s in enumerate(self.sources)
                      if isinstance(s, PAIR_SOURCES) != isinstance(self.sources[0], PAIR_SOURCES)), None)
        if other is not None:
            raise ConfigError(f"sources.{other}.kind", f"{self.sources[other].kind} and {self.sources[0].kind} cannot "
                              "share a dataset: one gives pairs, the other documents")
        for number, source in enumerate(self.sources):
            if source.split is not None and source.split not in self.split_names:
                raise ConfigError(f"sources.{number}.split", f'"{source.split}" is no split of this dataset; give it a '
                                  "share (0 will do) in splits")
            if isinstance(source, PairPresetSource) and source.preset == "msmarco_triplets" \
                    and source.validation_queries and source.split is None and "val" not in self.splits:
                raise ConfigError(f"sources.{number}.validation_queries", "they make split val; give it a share (0 "
                                  "will do) in splits, or 0 here")
        return self

    @property
    def kind(self) -> Literal["documents", "pairs"]:
        """What the sources give, and the dataset holds."""
        return "pairs" if isinstance(self.sources[0], PAIR_SOURCES) else "documents"

    @property
    def split_names(self) -> list[str]:
        """All splits, train first."""
        return [TRAIN, *self.splits]

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        found = _MEMORY.fullmatch(self.memory)
        assert found is not None  # validated
        return int(float(found[1]) * {"MB": 10**6, "GB": 10**9}[found[2]])
