"""The evaluation sets that training data must not hold, as an index of their n-grams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.clean_config import DecontaminateConfig
from data_prep.files import canonical_json, write_atomic
from data_prep.ngrams import NgramIndex
from data_prep.pair import Pair
from data_prep.pair_sources import read_pairs
from data_prep.reading import SetAside
from data_prep.source_config import PAIR_SOURCES
from data_prep.sources import Document, read_source
from data_prep.tally import BENIGN
from data_prep.words import I64, U64, word_hashes
from pretrain.errors import ConfigError

_BATCH = 512
ITEMS, SETS = "items.jsonl", "sets.json"


def build_index(config: DecontaminateConfig, folder: Path, max_document_bytes: int) -> NgramIndex:
    """Read every evaluation set and keep its index in `folder`, with a line for each item that says what it is.

    Texts of pairs are items by themselves. Raises ConfigError for a set without a text.
    """
    lines: list[bytes] = []
    set_aside: dict[str, int] = {}

    def batches() -> Iterator[tuple[U64, I64]]:
        for number, source in enumerate(config.against):
            before = len(lines)
            for batch in _batched(_texts(source, number, max_document_bytes, set_aside)):
                lines.extend(canonical_json(where | {"text": text}) + b"\n" for where, text in batch)
                yield word_hashes([text for _, text in batch])
            if len(lines) == before:
                raise ConfigError(f"decontaminate.against.{number}", f"{source.name} holds no text")
    index = NgramIndex.build(config.ngram, batches())
    index.save(folder)
    write_atomic(folder / SETS, json.dumps(set_aside).encode())
    write_atomic(folder / ITEMS, b"".join(lines))
    return index


def load_items(folder: Path) -> list[dict[str, Any]]:
    """Provenance and text of every item of a saved index."""
    return [json.loads(line) for line in (folder / ITEMS).read_bytes().splitlines()]


def load_set_aside(folder: Path) -> dict[str, int]:
    """Of each evaluation set, how many of its items could not be read."""
    found: dict[str, int] = json.loads((folder / SETS).read_bytes())
    return found


def _texts(source: Any, number: int, limit: int, set_aside: dict[str, int]) -> Iterator[tuple[dict[str, Any], str]]:
    set_aside[source.name] = 0
    read = read_pairs if isinstance(source, PAIR_SOURCES) else read_source
    for item in read(source, number, limit):
        if isinstance(item, Document):
            yield item.provenance, item.text.decode()
        elif isinstance(item, Pair):
            sides = ["query", "positive", *("negative" for _ in item.negatives)]
            for side, text in zip(sides, item.texts, strict=True):
                yield item.provenance | {"side": side}, text.decode()
        elif isinstance(item, SetAside) and item.reason not in BENIGN:
            set_aside[source.name] += item.items


def _batched(texts: Iterable[tuple[dict[str, Any], str]]) -> Iterator[list[tuple[dict[str, Any], str]]]:
    batch: list[tuple[dict[str, Any], str]] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
