"""Last stage: units of tokens to the shards of each split.

What an interrupted run published of a split is kept: its shards are listed again from their indexes, and as much as
they hold is passed over. The bytes do not show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.config import PrepConfig
from data_prep.manifest import SplitRecord
from data_prep.pairs import PairWriter, TokenPair
from data_prep.shards import ShardWriter
from data_prep.unit import Unit


@dataclass(slots=True)
class Packer:
    """Writes the splits of a dataset. Use as a context manager; `records` is filled when it is left."""

    config: PrepConfig
    folder: Path
    dtype: np.dtype[Any]
    records: dict[str, SplitRecord] = field(default_factory=dict)
    no_tokens: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Source -> (pairs, bytes) that have a text of which the tokenizer leaves nothing."""
    _writers: list[ShardWriter | PairWriter] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Packer:
        for split in self.config.split_names:
            writer = self._writer(split)
            writer.resume()
            self._stack.enter_context(writer)
            self._writers.append(writer)
        return self

    def _writer(self, split: str) -> ShardWriter | PairWriter:
        config = self.config
        if config.kind == "pairs":
            return PairWriter(self.folder, split, dtype=self.dtype, block_pairs=config.block_pairs,
                              blocks_per_shard=config.blocks_per_shard)
        return ShardWriter(self.folder, split, dtype=self.dtype, block_tokens=config.block_tokens,
                           blocks_per_shard=config.blocks_per_shard)

    def add(self, unit: Unit) -> None:
        """Write the items of a unit of tokens, in their order."""
        if self.config.kind == "pairs":
            self._add_pairs(unit)
        else:
            self._add_documents(unit)

    def _add_documents(self, unit: Unit) -> None:
        tokens, ends = unit["tokens"], np.cumsum(unit["lengths"])
        hashes = np.ascontiguousarray(unit["digest"][:, :8]).view("<i8")[:, 0].tolist()
        lines = unit.blob("provenance").split(b"\n")
        begin = 0
        for split, size, end, doc_hash, line in zip(unit["split"].tolist(), unit["size"].tolist(), ends.tolist(),
                                                    hashes, lines, strict=False):
            writer = self._writers[split]
            assert isinstance(writer, ShardWriter)
            writer.push(tokens[begin:end], utf8_bytes=size, source=unit.meta["source"], doc_hash=doc_hash,
                        provenance=line)
            begin = end

    def _add_pairs(self, unit: Unit) -> None:
        for split, size, pair in self._pairs(unit):
            if not all(map(len, (pair.query, pair.positive, *pair.negatives))):
                pairs, total = self.no_tokens.get(unit.meta["source"], (0, 0))
                self.no_tokens[unit.meta["source"]] = pairs + 1, total + size
                continue
            writer = self._writers[split]
            assert isinstance(writer, PairWriter)
            writer.push(pair, size)

    def _pairs(self, unit: Unit) -> Iterator[tuple[int, int, TokenPair]]:
        """(split, bytes, pair) of each item."""
        texts = np.split(unit["tokens"], np.cumsum(unit["lengths"])[:-1])
        ids, scores = unit["ids"].tolist(), unit["scores"].tolist()
        lines = unit.blob("provenance").split(b"\n")
        begin = 0
        for i, (split, size, count) in enumerate(zip(unit["split"].tolist(), unit["size"].tolist(),
                                                     unit["n_texts"].tolist(), strict=True)):
            end = begin + count
            query, positive, *negatives = texts[begin:end]
            yield split, size, TokenPair(
                query, positive, negatives, ids[begin], ids[begin + 1], ids[begin + 2:end],
                [None if math.isnan(score) else score for score in scores[begin + 2:end]], lines[i])
            begin = end

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.records = {writer.split: writer.record for writer in self._writers if writer.record is not None}
