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


class PairSourceBase(SourceBase):
    """Base of the sources of pairs: query, positive, negatives. Limits count pairs."""

    split: str | None = Field(None, description="put all pairs in this split; null: by hash of the query or package")


class PairTableSource(PairSourceBase):
    """Rows of .csv, .tsv (both with a header) or .jsonl files; plain, .gz or .zst."""

    kind: Literal["pair_table"] = "pair_table"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.jsonl*", description="which files; ** goes through subfolders, hidden files never")
    query: str = Field("query", description="column of the query; of a JSON list, its position (\"0\")")
    positive: str = Field("positive", description="column of the passage that answers")
    negatives: list[str] = Field(default_factory=list, description="columns of passages that do not: text or list")
    query_id: str | None = Field(None, description="column of the query's id; null: hash of its text")
    positive_id: str | None = Field(None, description="column of the positive's id; null: hash of its text")


class BeirSource(PairSourceBase):
    """A BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv. Judgements of 0 and below are negatives."""

    kind: Literal["beir"] = "beir"
    path: str = Field(description="the folder")
    qrels: list[str] = Field(default_factory=list, description="names of judgements (train, dev, test); empty: all")


class PythonPairsSource(PairSourceBase):
    """Docstring summaries and function bodies of Python packages, whole packages to a split."""

    kind: Literal["python_pairs"] = "python_pairs"
    name: str = "python_pairs"
    path: str | None = Field(None, description="folder of packages; null: standard library and site-packages")
    min_summary_words: int = Field(4, ge=1, description="words with a letter that a summary has at least")
    max_summary_words: int = Field(64, ge=1, description="and at most")
    min_body_chars: int = Field(40, ge=1, description="characters that a body has at least")
    max_body_chars: int = Field(4000, ge=1, description="and at most")


PairSource = PairTableSource | BeirSource | PythonPairsSource
AnySource = Annotated[StdlibSource | FolderSource | JsonlSource | PairSource, Field(discriminator="kind")]


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
        description="share of documents, by keyed hash of their text, for each split but train, which is the rest; "
                    "0: only what a source puts there")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    max_document_bytes: int = Field(64 << 20, ge=1, le=1 << 30, description="longer documents are set aside, not read")
    block_tokens: int = Field(16384, ge=64, le=1 << 24, description="tokens a sample of the shards holds")
    block_pairs: int = Field(1024, ge=1, le=1 << 20, description="pairs a sample of the shards holds")
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
            if not 0 <= share < 1:
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

    @model_validator(mode="after")
    def _one_kind(self) -> PrepConfig:
        other = next((i for i, s in enumerate(self.sources)
                      if isinstance(s, PairSourceBase) != isinstance(self.sources[0], PairSourceBase)), None)
        if other is not None:
            raise ConfigError(f"sources.{other}.kind", f"{self.sources[other].kind} and {self.sources[0].kind} cannot "
                              "share a dataset: one gives pairs, the other documents")
        for number, source in enumerate(self.sources):
            split = getattr(source, "split", None)
            if split is not None and split != TRAIN and split not in self.splits:
                raise ConfigError(f"sources.{number}.split", f'"{split}" is no split of this dataset; give it a share '
                                  "(0 will do) in splits")
        return self

    @property
    def kind(self) -> Literal["documents", "pairs"]:
        """What the sources give, and the dataset holds."""
        return "pairs" if isinstance(self.sources[0], PairSourceBase) else "documents"
