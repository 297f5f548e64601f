"""`manifest.json` of a dataset folder and the table of shards of each split.

    DATASET/manifest.json          written last: a folder without it is no dataset
    DATASET/SPLIT.shards.bin       [shards] `SHARD_TABLE`, memory-mapped
    DATASET/SPLIT-NNNNNN.tar .idx  see shards.py
    DATASET/tokenizer.json         the tokenizer whose SHA-256 the manifest names
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from data_prep.files import canonical_json, size_problem, write_atomic
from data_prep.index import LAYOUTS, IndexLayout, index_bytes, index_path
from pretrain.config.model import Section
from pretrain.config.suggest import nearest
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.publish import fsync, hash_file

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SHARD_TABLE = np.dtype([("first_token", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("name_id", "<u8"),
                        ("sha256", "u1", (32,))])
"""One row a shard: position of its first token in the split, tokens, bytes of the tar, number in its name, its hash.

In a dataset of pairs `first_token` and `tokens` count pairs."""
LOOKED_AT = 4096
"""Shards of a split whose files are looked at when a dataset is opened, evenly spread; the others' when first used."""
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")


def shard_name(split: str, name_id: int) -> str:
    """File name of a shard."""
    return f"{split}-{name_id:06d}.tar"


def write_table(folder: Path, split: str, table: npt.NDArray[Any]) -> tuple[str, str]:
    """Write a split's table of shards. Returns its file name and SHA-256.

    Raises:
        UserError: for a split name that is no plain lower-case word (it becomes part of file names).
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise UserError(f'"{split}" is no split name: use lower-case letters, digits and _')
    name = f"{split}.shards.bin"
    return name, write_atomic(folder / name, table.tobytes())


def shard_table(rows: list[tuple[int, int, int, int, bytes]]) -> npt.NDArray[Any]:
    """[shards] `SHARD_TABLE` of (first item, items, bytes of the tar, number in its name, SHA-256 digest)."""
    table = np.zeros(len(rows), SHARD_TABLE)
    for row, (first, items, size, name_id, digest) in zip(table, rows, strict=True):
        row["first_token"], row["tokens"], row["bytes"], row["name_id"] = first, items, size, name_id
        row["sha256"] = np.frombuffer(digest, "u1")
    return table


class SplitRecord(Section):
    """A split's entry in the manifest."""

    tokens: int = Field(ge=0, description="tokens, those that end documents included; of pairs: of all texts")
    docs: int = Field(ge=0, description="documents, or pairs")
    bytes: int = Field(ge=0, description="UTF-8 bytes of their text")
    table: str = Field(pattern=r"^[a-z][a-z0-9_]*\.shards\.bin$", description="file name of the table of shards")
    table_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of that file")


class PairsRecord(Section):
    """How the texts of a dataset of pairs are stored, and what a loader puts around them."""

    block_pairs: int = Field(ge=1, description="pairs of every block but a split's last")
    prefix_ids: list[int] = Field(description="ids before each text, which shards leave out ([CLS])")
    suffix_ids: list[int] = Field(description="ids after each text, which shards leave out ([SEP], end of text)")
    pad_id: int = Field(ge=0, description="id that fills up a row")


@dataclass(frozen=True)
class Split:
    """One split of an opened dataset."""

    name: str
    folder: Path
    table: npt.NDArray[Any]
    """[shards] `SHARD_TABLE`, a read-only map of the file."""
    tokens: int
    docs: int
    bytes: int
    block_tokens: int
    """Tokens of every block but the last; 0 in a dataset of pairs."""
    block_pairs: int = 0
    """Pairs of every block but the last; 0 in a dataset of documents."""

    @property
    def n_shards(self) -> int:
        """Shards of this split."""
        return len(self.table)

    @property
    def n_blocks(self) -> int:
        """Blocks of this split; block i begins at token i * block_tokens, or pair i * block_pairs."""
        return -(-self.docs // self.block_pairs) if self.block_pairs else -(-self.tokens // self.block_tokens)

    def shard_of(self, token_position: int) -> int:
        """The shard that holds a token of a split of documents. Raises IndexError outside of the split."""
        if not 0 <= token_position < self.tokens:
            raise IndexError(f"split {self.name} has tokens 0 to {self.tokens - 1}, asked for {token_position}")
        return int(np.searchsorted(self.table["first_token"], token_position, side="right")) - 1

    def tar_path(self, shard: int) -> Path:
        """The tar of a shard; its index has the suffix `.idx`."""
        return self.folder / shard_name(self.name, int(self.table[shard]["name_id"]))


class Manifest(Section):
    """What a dataset folder states about itself."""

    format: Literal[1] = 1
    tokenizer_sha256: str | None = Field(description="SHA-256 of tokenizer.json; null: ids without a tokenizer")
    dtype: Literal["<u2", "<u4"] = Field(description="type of the tokens")
    kind: Literal["documents", "pairs"] = Field("documents", description="what a sample of the shards is made of")
    block_tokens: int = Field(ge=0, description="tokens of every block but a split's last; 0 for pairs")
    pairs: PairsRecord | None = Field(None, description="null for documents")
    eos_id: int = Field(ge=0, description="id that ends each document")
    vocab_size: int = Field(ge=1, description="ids are below this")
    splits: dict[str, SplitRecord]
    provenance: dict[str, Any] = Field(description="how the data was made; `paths` in it is no part of the fingerprint")
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The dataset folder."""
        return self._folder

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON without paths. The tables' hashes are in it, so the content is covered."""
        stated = self.model_dump(mode="json")
        if self.kind == "documents":
            del stated["kind"], stated["pairs"]  # which fingerprints of documents are older than
        stated["provenance"] = {k: v for k, v in self.provenance.items() if k != "paths"}
        return hashlib.sha256(canonical_json(stated)).hexdigest()

    @model_validator(mode="after")
    def _block_of_its_kind(self) -> Manifest:
        if (self.kind == "pairs") != (self.pairs is not None) or (self.kind == "pairs") == (self.block_tokens > 0):
            raise ValueError(f"kind {self.kind} does not go with block_tokens {self.block_tokens}, pairs {self.pairs}")
        return self

    @property
    def layout(self) -> IndexLayout:
        """What the sidecars of the shards look like."""
        return LAYOUTS[self.kind]

    def require(self, kind: Literal["documents", "pairs"]) -> None:
        """Raise UserError, naming the kind of source that reads this dataset, where it does not hold `kind`."""
        if self.kind != kind:
            source = {"documents": "shards", "pairs": "pairs"}[self.kind]
            raise UserError(f"{self.folder}: holds {self.kind}, not {kind}; it is read by a source of kind: {source}")

    def located(self, folder: Path) -> Manifest:
        """The same manifest, of a dataset in `folder`."""
        found = self.model_copy()
        found._folder = folder
        return found

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Parse `folder`/manifest.json and nothing else.

        Raises:
            UserError: no dataset there, or one of another format.
            DataCorruption: a manifest that is no manifest.
        """
        path = folder / MANIFEST
        try:
            stated = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: no dataset here, {MANIFEST} is missing (`pretrain prep` writes one)") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise DataCorruption(f"{path}: not JSON ({error})") from None
        found = stated.get("format") if isinstance(stated, dict) else None
        if found != FORMAT:
            raise UserError(f"{path}: format {found!r}, this version reads format {FORMAT}; prepare the data again")
        try:
            manifest = cls.model_validate(stated)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataCorruption(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return manifest.located(folder)

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Open a dataset: the manifest, the hashes of tables and tokenizer, the presence and size of the files.

        Of a split with more than `LOOKED_AT` shards so many are looked at, so that opening takes no longer for more.

        Raises:
            UserError: no dataset there, or one of another format.
            DataCorruption: the first fault, naming the file. Content of shards is not read; see `verify_shard`.
        """
        manifest = cls.read(Path(folder))
        problems = manifest.problems(most=LOOKED_AT)
        if problems:
            more = f" (and {len(problems) - 1} more; see `pretrain data verify`)" if len(problems) > 1 else ""
            raise DataCorruption(problems[0] + more)
        return manifest

    def problems(self, shards: bool = True, most: int | None = None) -> list[str]:
        """Every fault that shows without reading shards: tokenizer, tables and, with `shards`, missing or wrong sizes.

        `most`: shards of a split that are looked at, evenly spread; None for all.
        """
        found = []
        if self.tokenizer_sha256 is not None:
            found += _hash_problem(self.folder / TOKENIZER, self.tokenizer_sha256, "another tokenizer")
        for name, record in self.splits.items():
            table = self.folder / record.table
            fault = _hash_problem(table, record.table_sha256, "changed bytes or a foreign manifest")
            found += fault or (self._size_problems(name, record, most) if shards else [])
        return found

    def _size_problems(self, name: str, record: SplitRecord, most: int | None) -> list[str]:
        split = self.split(name)
        items, block_items = ((record.tokens, self.block_tokens) if self.pairs is None
                              else (record.docs, self.pairs.block_pairs))
        if int(split.table["tokens"].sum()) != items:
            return [f"{self.folder / record.table}: {int(split.table['tokens'].sum())} {self.layout.items}, "
                    f"{MANIFEST} says {items}"]
        found = []
        for shard in range(0, split.n_shards, max(1, -(-split.n_shards // (most or split.n_shards or 1)))):
            tar = split.tar_path(shard)
            blocks = -(-int(split.table[shard]["tokens"]) // block_items)
            sizes = ((tar, int(split.table[shard]["bytes"])), (index_path(tar), index_bytes(blocks, self.layout)))
            found += [problem for path, size in sizes if (problem := size_problem(path, size))]
        return found

    def split(self, name: str) -> Split:
        """One split. Raises UserError for a name that the dataset does not have."""
        record = self.splits.get(name)
        if record is None:
            raise UserError(f'{self.folder}: no split "{name}"{nearest(name, self.splits)}; '
                            f"it has {', '.join(self.splits)}")
        path = self.folder / record.table
        size = path.stat().st_size
        table = np.memmap(path, SHARD_TABLE, "r") if size else np.zeros(0, SHARD_TABLE)  # nothing to map in 0 bytes
        return Split(name, self.folder, table, record.tokens, record.docs, record.bytes, self.block_tokens,
                     self.pairs.block_pairs if self.pairs else 0)


def _hash_problem(path: Path, expected: str, likely: str) -> list[str]:
    try:
        actual = hash_file(path)
    except OSError as error:
        return [f"{path}: missing or unreadable ({error.strerror})"]
    if actual == expected:
        return []
    return [f"{path}: SHA-256 is {actual[:16]}..., {MANIFEST} says {expected[:16]}... ({likely})"]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json, atomically and after everything else is on the disk: it makes `folder` a dataset."""
    stated = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    write_atomic(folder / MANIFEST, stated.encode() + b"\n")
    fsync(folder)
    return Manifest.load(folder)
