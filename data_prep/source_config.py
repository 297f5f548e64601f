"""Sections that describe where documents and pairs are read from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section
from pretrain.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ROWS = "**/*.jsonl*"


class SourceBase(Section):
    """Base of the sources: documents or pairs in a fixed order, the order of their paths."""

    name: str = Field(description="short name, kept with every document")
    split: str | None = Field(None, description="put everything in this split; null: by hash of the text or query")
    max_documents: int | None = Field(None, ge=1, description="stop after this many documents or pairs; null: all")
    max_bytes: int | None = Field(None, ge=1, description="stop before the text exceeds this many bytes; null: all")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("use letters, digits, - and _")
        return value


class HubDataset(Section):
    """A dataset of the `datasets` library: saved to disk, of local files, or of the hub."""

    path: str = Field(description="folder written by save_to_disk, a builder (json, parquet, ...) or a name of the hub")
    subset: str | None = Field(None, description="configuration of the dataset; null: its only one")
    split: str = Field("train", description="split of that dataset")
    revision: str | None = Field(None, description="commit or tag on the hub; null: the newest")
    data_files: list[str] = Field(default_factory=list, description="files a builder reads")
    streaming: bool = Field(False, description="read while it is downloaded, in one piece; false: download first")


class StdlibSource(SourceBase):
    """The running interpreter's own standard-library .py files, as many as it has; site-packages is left out."""

    kind: Literal["stdlib"] = "stdlib"
    name: str = "stdlib"


class FolderSource(SourceBase):
    """Every file of a folder is one document."""

    kind: Literal["text"] = "text"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.txt", description="which files; ** goes through subfolders, hidden files never")


class MarkdownSource(SourceBase):
    """Every Markdown file of a folder is one document, without its front matter and HTML comments."""

    kind: Literal["markdown"] = "markdown"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.md", description="which files; ** goes through subfolders, hidden files never")


class PythonSource(SourceBase):
    """Every .py file of a source tree is one document."""

    kind: Literal["python"] = "python"
    path: str | None = Field(None, description="a folder, or one file; null: the interpreter's site-packages")
    glob: str = Field("**/*.py", description="which files; ** goes through subfolders, hidden files never")


class JsonlSource(SourceBase):
    """One JSON object a line; plain, .gz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="a folder, or one file")
    glob: str = Field(_ROWS, description="which files; ** goes through subfolders, hidden files never")
    text_field: str = Field("text", description="key of the document's text")


class TableSource(SourceBase):
    """Rows of .csv and .tsv files with a header; plain, .gz or .zst."""

    kind: Literal["table"] = "table"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.[ct]sv*", description="which files; ** goes through subfolders, hidden files never")
    text_field: str = Field("text", description="column of the document's text")
    columns: list[str] | None = Field(None, description="names of the columns of files without a header")


class ParquetSource(SourceBase):
    """Rows of Parquet files."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.parquet", description="which files; ** goes through subfolders, hidden files never")
    text_field: str = Field("text", description="column of the document's text")


class HubSource(SourceBase):
    """Rows of a dataset of the `datasets` library."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: HubDataset
    text_field: str = Field("text", description="column of the document's text")


class TarSource(SourceBase):
    """Samples of webdataset tars. Members are read, never extracted."""

    kind: Literal["webdataset"] = "webdataset"
    path: str = Field(description="a folder, or one file")
    glob: str = Field("**/*.tar", description="which files; ** goes through subfolders, hidden files never")
    member: str = Field("txt", description="what follows the first dot of a member's name; json: an object")
    text_field: str = Field("text", description="key of the text where the member is a JSON object")


class RowsOfPairs(SourceBase):
    """Base of the pairs that stand in rows: of files, or of a dataset of the `datasets` library."""

    path: str | None = Field(None, description="a folder, or one file: .jsonl, .csv, .tsv (.gz, .zst) or .parquet")
    glob: str = Field(_ROWS, description="which files; ** goes through subfolders, hidden files never")
    dataset: HubDataset | None = Field(None, description="in place of path")

    @model_validator(mode="after")
    def _one_place(self) -> RowsOfPairs:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError("path", f"source {self.name} needs either path or dataset")
        return self


class PairTableSource(RowsOfPairs):
    """A pair a row, in named columns."""

    kind: Literal["pair_table"] = "pair_table"
    columns: list[str] | None = Field(None, description="names of the columns of .csv and .tsv files without a header")
    query: str = Field("query", description="column of the query; of a JSON list, its position (\"0\")")
    positive: str = Field("positive", description="column of the passage that answers")
    negatives: list[str] = Field(default_factory=list, description="columns of passages that do not: text or list")
    query_id: str | None = Field(None, description="column of the query's id; null: hash of its text")
    positive_id: str | None = Field(None, description="column of the positive's id; null: hash of its text")


class PairPresetSource(RowsOfPairs):
    """A well-known set of pairs by the rules of its rows; see pair_presets.py."""

    kind: Literal["pair_preset"] = "pair_preset"
    preset: Literal["allnli", "qqp", "msmarco", "wikianswers", "snli", "msmarco_triplets"]
    max_rows: int | None = Field(None, ge=1, description="rows read at most; null: what the preset says")
    legacy_labels: bool = Field(False, description="the label rules of the first scripts, which take non-duplicates "
                                "(qqp) and neutral pairs (snli) for pairs: for comparison only")
    queries: int = Field(100_000, ge=1, description="msmarco_triplets: queries drawn by keyed hash, a triplet each")
    validation_queries: int = Field(2_000, ge=0, description="msmarco_triplets: how many of them make split val")
    seed: int = Field(42, ge=0, lt=1 << 63, description="msmarco_triplets: key of the draw")


class BeirSource(SourceBase):
    """A BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv. Judgements of 0 and below are negatives."""

    kind: Literal["beir"] = "beir"
    path: str = Field(description="the folder")
    qrels: list[str] = Field(default_factory=list, description="names of judgements (train, dev, test); empty: all")


class PythonPairsSource(SourceBase):
    """Docstring summaries and function bodies of Python packages, whole packages to a split."""

    kind: Literal["python_pairs"] = "python_pairs"
    name: str = "python_pairs"
    path: str | None = Field(None, description="folder of packages; null: standard library and site-packages")
    min_summary_words: int = Field(4, ge=1, description="words with a letter that a summary has at least")
    max_summary_words: int = Field(64, ge=1, description="and at most")
    min_body_chars: int = Field(40, ge=1, description="characters that a body has at least")
    max_body_chars: int = Field(4000, ge=1, description="and at most")


FileSource = StdlibSource | FolderSource | MarkdownSource | PythonSource
RowSource = JsonlSource | TableSource | ParquetSource | HubSource
DocumentSource = FileSource | RowSource | TarSource
PairSource = PairTableSource | PairPresetSource | BeirSource | PythonPairsSource
PAIR_SOURCES = (PairTableSource, PairPresetSource, BeirSource, PythonPairsSource)
AnySource = Annotated[DocumentSource | PairSource, Field(discriminator="kind")]
EvaluationSource = Annotated[DocumentSource | PairTableSource | BeirSource, Field(discriminator="kind")]
"""What an evaluation set is read from; of pairs each text counts by itself."""
