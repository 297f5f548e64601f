"""`PrepConfig`: one typed description of a dataset, from raw text to shards."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section
from pretrain.errors import ConfigError

TRAIN = "train"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class SourceBase(Section):
    """Base of the sources: documents in a fixed order, the order of their paths."""

    name: str = Field(description="short name, kept with every document")
    max_documents: int | None = Field(None, ge=1, description="stop after this many documents; null: all")
    max_bytes: int | None = Field(None, ge=1, description="stop before the text exceeds this many bytes; null: all")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("use letters, digits, - and _")
        return value


class StdlibSource(SourceBase):
    """The running interpreter's own standard-library .py files, as many as it has; site-packages is left out."""

    kind: Literal["stdlib"] = "stdlib"
    name: str = "stdlib"


class FolderSource(SourceBase):
    """Every file of a folder is one document."""

    kind: Literal["text"] = "text"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.txt", description="which files; ** goes through subfolders, hidden files never")


class JsonlSource(SourceBase):
    """One JSON object a line; plain, .gz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.jsonl*", description="which files; ** goes through subfolders, hidden files never")
    text_field: str = Field("text", description="key of the document's text")


AnySource = Annotated[StdlibSource | FolderSource | JsonlSource, Field(discriminator="kind")]


class DedupConfig(Section):
    """Which copies of a document are dropped."""

    exact: bool = Field(True, description="keep the first of documents equal but for line ends and outer white space")


class TokenizerConfig(Section):
    """A tokenizer that exists, or one trained here on the train split."""

    path: str | None = Field(None, description="a tokenizer.json to use as it is; null: train a byte-level BPE")
    vocab_size: int = Field(8192, ge=258, le=1 << 20, description="ids of a trained tokenizer, special tokens included")
    min_frequency: int = Field(2, ge=1, description="a pair seen less often is not merged (training only)")
    sample_bytes: int = Field(256 << 20, ge=1, description="train split text the training sees at most, in UTF-8 bytes")
    eos_token: str = Field("<|endoftext|>", min_length=1, description="ends each document; one token of the vocabulary")
    pad_token: str = Field("<|pad|>", min_length=1, description="fills batches; never in the shards (training only)")

    @model_validator(mode="after")
    def _distinct(self) -> TokenizerConfig:
        if self.path is None and self.eos_token == self.pad_token:
            raise ConfigError("tokenizer.pad_token", f'"{self.pad_token}" is the eos_token too; the two must differ')
        return self


class PrepConfig(Section):
    """How a dataset is made. The same config and sources give the same bytes for any number of workers."""

    out: str = Field(description="dataset folder to write")
    sources: list[AnySource] = Field(min_length=1, description="read in this order")
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    splits: dict[str, float] = Field(
        default_factory=lambda: {"val": 0.01},
        description="share of documents, by keyed hash of their text, for each split but train, which is the rest")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    max_document_bytes: int = Field(64 << 20, ge=1, le=1 << 30, description="longer documents are set aside, not read")
    block_tokens: int = Field(16384, ge=64, le=1 << 24, description="tokens a sample of the shards holds")
    blocks_per_shard: int | None = Field(None, ge=1, description="null: shards of about 64 MB")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the split and of the tokenizer's sample")
    workers: int | None = Field(None, ge=1, le=1024, description="tokenizing processes; null: one a core")

    @field_validator("splits")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for name, share in value.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == TRAIN:
                raise ValueError(f'"{name}" cannot be given a share: use lower-case letters, digits and _; '
                                 f"{TRAIN} is what the others leave")
            if not 0 < share < 1:
                raise ValueError(f"{name}: {share} must lie between 0 and 1")
        if sum(value.values()) >= 1:
            raise ValueError(f"the shares add up to {sum(value.values()):g}, which leaves nothing for {TRAIN}")
        return value

    @field_validator("sources")
    @classmethod
    def _unique_names(cls, value: list[SourceBase]) -> list[SourceBase]:
        names = [source.name for source in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'two sources are called "{twice[0]}"; give each its own name')
        return value
