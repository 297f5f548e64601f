"""First stage: read a piece of a source, clean it and keep what is left with all its hashes.

The result of a piece is a row of units (see unit.py) of about 8 MB of text each, and a mark that says how many. Where
the units lie says nothing about the dataset; what follows only takes them one after the other. A piece that was
interrupted goes on after its last unit: what was read is read again and passed over, nothing is cleaned or hashed
twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean import Cleaner, Dropped
from data_prep.config import TRAIN, PrepConfig
from data_prep.files import canonical_json, write_atomic
from data_prep.item import HOME_NAMES, Item, item_of
from data_prep.minhash import band_hashes
from data_prep.ngrams import NgramIndex
from data_prep.pair import Found, Pair, Rejected
from data_prep.pair_sources import read_pair_parts
from data_prep.plan import Piece
from data_prep.reading import Meter, SetAside
from data_prep.source_config import PAIR_SOURCES
from data_prep.sources import Document, limited, read_parts
from data_prep.split import Splitter, keyed_hash
from data_prep.tally import Tally
from data_prep.unit import Unit, write_unit
from data_prep.words import word_hashes
from pretrain.runfolder.publish import fsync

CHUNK_BYTES = 8 << 20
"""Text of a unit."""
CHUNK_ITEMS = 1 << 14
"""Kept items of a unit at most."""
CHUNK_READ = 1 << 16
"""Items read for a unit at most, where most are dropped."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading a piece needs. Made once in each process."""

    config: PrepConfig
    folder: Path
    """Where units go."""
    index: NgramIndex | None
    """n-grams of the evaluation sets to look for."""
    chunk_bytes: int = CHUNK_BYTES

    def read(self, piece: Piece, advance: Callable[[int], None]) -> None:
        """Read a piece to the end, or do nothing where that is done. `advance` is told of bytes read from disk."""
        if is_read(self.folder, piece.number):
            advance(piece.size)
            return
        done = _units_there(self.folder, piece.number)
        passed_over = Unit(done[-1]).meta["consumed"] if done else 0
        meter = Meter()
        stream = enumerate(self._items(piece, meter), 1)
        chunk = _Chunk(self, piece, len(done), passed_over)
        told = 0
        for consumed, found in stream:
            if consumed <= passed_over:
                continue
            chunk.add(found, consumed)
            if chunk.full:
                chunk.write()
                advance(meter.bytes - told)
                told = meter.bytes
                chunk = _Chunk(self, piece, chunk.number + 1, consumed)
        chunk.write()
        advance(meter.bytes - told)
        fsync(self.folder)
        write_atomic(_mark(self.folder, piece.number), json.dumps({"units": chunk.number + 1}).encode())
        fsync(self.folder)

    def _items(self, piece: Piece, meter: Meter) -> Iterator[Document | Found]:
        source, limit = self.config.sources[piece.source], self.config.max_document_bytes
        if isinstance(source, PAIR_SOURCES):
            return limited(read_pair_parts(source, piece.source, piece.parts, limit, meter), source)
        return limited(read_parts(source, piece.source, piece.parts, limit, meter), source)


def unit_name(piece: int, number: int) -> str:
    """File name of a unit of a piece."""
    return f"{piece:06d}-{number:06d}.unit"


def _mark(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.done"


def is_read(folder: Path, piece: int) -> bool:
    """Whether a piece is read to its end."""
    return _mark(folder, piece).exists()


def units_of(folder: Path, pieces: int) -> list[Path]:
    """The units of all pieces, which are read, in order."""
    counts = [json.loads(_mark(folder, piece).read_bytes())["units"] for piece in range(pieces)]
    return [folder / unit_name(piece, number) for piece, count in enumerate(counts) for number in range(count)]


def _units_there(folder: Path, piece: int) -> list[Path]:
    """Units that an interrupted reading left, the first ones without a gap."""
    found: list[Path] = []
    while (path := folder / unit_name(piece, len(found))).exists():
        found.append(path)
    return found


@dataclass(slots=True)
class _Chunk:
    """A unit while it is filled."""

    reader: Reader
    piece: Piece
    number: int
    consumed: int
    """Items of the piece that lie before the end of this unit."""
    begin: int = field(init=False)
    items: list[Item] = field(default_factory=list)
    size: int = 0
    tally: Tally = field(default_factory=Tally)
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    cleaner: Cleaner = field(init=False)
    splitter: Splitter = field(init=False)

    def __post_init__(self) -> None:
        config = self.reader.config
        self.begin, self.cleaner = self.consumed, Cleaner(config.clean, Counter())
        self.splitter = Splitter(config.splits, config.seed)

    @property
    def full(self) -> bool:
        return (self.size >= self.reader.chunk_bytes or len(self.items) >= CHUNK_ITEMS
                or self.consumed - self.begin >= CHUNK_READ)

    @property
    def _asks_for_negatives(self) -> bool:
        return bool(getattr(self.reader.config.sources[self.piece.source], "negatives", None))

    def add(self, found: Document | Found, consumed: int) -> None:
        """Take what was read, number `consumed` of the piece."""
        self.consumed = consumed
        name = self.reader.config.sources[self.piece.source].name
        if isinstance(found, SetAside):
            self.tally.set_aside(name, found)
            self.set_aside.append(found.provenance | {"reason": found.reason, "detail": found.detail})
        elif isinstance(found, Rejected):
            self.tally.add(name, found.reason, 0)
        else:
            if isinstance(found, Pair) and not found.negatives and self._asks_for_negatives:
                self.cleaner.changes["pairs_without_negatives"] += 1  # a column that is gone looks like one of nulls
            item = item_of(found, self.reader.config, self.splitter, self.cleaner)
            if isinstance(item, Dropped):
                size = len(found.text) if isinstance(found, Document) else sum(map(len, found.texts))
                self.tally.add(name, item.reason, size)
                self.tally.example(name, item.reason, found.provenance, item.detail)
            else:
                self.items.append(item)
                self.size += item.size

    def write(self) -> None:
        """Publish the unit."""
        config, items = self.reader.config, self.items
        splits = {name: i for i, name in enumerate(config.split_names)}
        texts = [text for item in items for text in item.texts]
        arrays: dict[str, Any] = {
            "digest": np.frombuffer(b"".join(item.digest for item in items), np.uint8).reshape(-1, 16),
            "split": np.array([splits[item.split] for item in items], np.int16),
            "size": np.array([item.size for item in items], np.int64),
            "rank": np.array([keyed_hash(item.digest, config.seed, "sample") for item in items], np.uint64),
            "n_texts": np.array([len(item.texts) for item in items], np.int64),
            "text_bytes": np.array([len(text) for text in texts], np.int64)}
        if config.kind == "pairs":
            arrays |= _pair_arrays(items)
        arrays |= self._hashes(texts)
        pairs = config.kind == "pairs"
        lines = [canonical_json(item.provenance | ({"bytes": item.size} if pairs else {})) + b"\n" for item in items]
        write_unit(self.reader.folder / unit_name(self.piece.number, self.number), arrays,
                   {"texts": b"".join(texts), "provenance": b"".join(lines)},
                   {"source": self.piece.source, "consumed": self.consumed, "tally": self.tally.state(),
                    "set_aside": self.set_aside, "changes": dict(sorted(self.cleaner.changes.items()))})

    def _hashes(self, texts: list[bytes]) -> dict[str, Any]:
        """Band hashes of the items and n-grams of evaluation sets in the texts, as far as they are asked for."""
        near, index = self.reader.config.dedup.near, self.reader.index
        found: dict[str, Any] = {}
        if near is None and index is None:
            return found
        pairs = self.reader.config.kind == "pairs"
        words = word_hashes([text.decode() for text in texts])
        if near is not None:
            whole = word_hashes([b"\n".join(item.texts[:2]).decode() for item in self.items]) if pairs else words
            found["bands"] = band_hashes(*whole, near.bands, near.rows)
        if index is not None:
            hits = index.probe(*words)
            owner = np.repeat(np.arange(len(self.items)), [len(item.texts) for item in self.items])[hits.texts]
            # Of pairs, validation is held clean too; not what a source's `split` holds out: it may be the very set.
            drawn = pairs and self.reader.config.sources[self.piece.source].split is None
            looked = np.array([drawn or item.split == TRAIN for item in self.items], np.bool_)[owner]
            found |= {"hit_item": owner[looked], "hit_text": hits.texts[looked], "hit_gram": hits.grams[looked]}
        return found


def _pair_arrays(items: list[Item]) -> dict[str, Any]:
    kinds = range(len(HOME_NAMES))
    none = bytes(16)
    homes = b"".join(item.homes.get(kind, none) for item in items for kind in kinds)
    return {"homes": np.frombuffer(homes, np.uint8).reshape(-1, len(kinds), 16),
            "has_home": np.array([[kind in item.homes for kind in kinds] for item in items],
                                 np.bool_).reshape(-1, len(kinds)),
            "ids": np.array([number for item in items for number in item.ids], np.uint64),
            "scores": np.array([score for item in items for score in item.scores], np.float32)}


