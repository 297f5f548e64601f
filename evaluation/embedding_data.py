"""What embeddings are judged on: pairs of texts with scores, and queries with judged passages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest
from data_prep.pairs import drawn_pairs, stored_pairs
from data_prep.reading import format_of
from evaluation.tabular import json_object, lists, objects, opened
from pretrain.errors import UserError

_SCORE_NAMES = ("score", "label", "similarity_score")


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Pairs of texts and how alike people found them."""

    first: list[str]
    second: list[str]
    scores: list[float]
    name: str


def read_scored_pairs(path: Path) -> ScoredPairs:
    """Read (sentence1, sentence2, score) from csv or tsv (with or without a header), jsonl, parquet, or a folder that
    `datasets` saved; the first three also as .gz or .zst.

    Raises UserError naming file and line.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    found = ScoredPairs([], [], [], path.name)
    for where, row in _scored_rows(path):
        try:
            first, second, score = row["sentence1"], row["sentence2"], float(row["score"])
            if not math.isfinite(score) or not isinstance(first, str) or not isinstance(second, str):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: is no row of sentence1, sentence2, score (a number): {str(row)[:100]}") from None
        found.first.append(first)
        found.second.append(second)
        found.scores.append(score)
    if len(found.scores) < 2:
        raise UserError(f"{path}: holds {len(found.scores)} pairs; a correlation needs two at least")
    return found


def _scored_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = format_of(path)
    if path.is_dir() or kind in (".parquet", ".jsonl"):
        yield from ((where, _named(row)) for where, row in objects(path))
    elif kind in (".csv", ".tsv"):
        names = ["sentence1", "sentence2", "score"]
        for number, (where, fields) in enumerate(lists(path)):
            if number == 0 and "sentence1" in fields:
                names = fields
            else:
                yield where, _named(dict(zip(names, fields, strict=False)))
    else:
        raise UserError(f"{path}: .csv, .tsv, .jsonl, .parquet or a folder of `datasets` would be right")


def _named(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its score under the one name."""
    name = next((name for name in _SCORE_NAMES if name in row), None)
    return {**row, "score": row[name]} if name else row


@dataclass(frozen=True, slots=True)
class Judgements:
    """Queries, passages, and which passages answer which query."""

    queries: list[str]
    passages: list[str]
    relevant: list[dict[int, float]]
    """By query: relevance by number of the passage."""
    name: str
    query_ids: list[str] = field(default_factory=list)
    passage_ids: list[str] = field(default_factory=list)


def read_beir(folder: Path, qrels: str = "test") -> Judgements:
    """A BEIR folder: all of corpus.jsonl, and the queries that qrels/QRELS.tsv judges.

    Raises UserError naming the file, and the line, that is missing or wrong.
    """
    for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{qrels}.tsv"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: is no BEIR folder: {name} is missing")
    passages = _by_id(folder / "corpus.jsonl",
                      lambda record: f"{record.get('title') or ''} {record.get('text') or ''}".strip())
    texts = _by_id(folder / "queries.jsonl", lambda record: str(record.get("text") or ""))
    numbers = {name: number for number, name in enumerate(passages)}
    relevant: dict[str, dict[int, float]] = {}
    path = folder / "qrels" / f"{qrels}.tsv"
    for line, content in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = content.split("\t")
        known = len(fields) == 3 and fields[0] in texts and fields[1] in numbers
        if not content.strip() or (line == 1 and not known):
            continue  # the first line is a header, as a rule
        if not known:
            raise UserError(f"{path}:{line}: is no query-id, corpus-id, score of known ids: {content[:100]}")
        try:
            relevant.setdefault(fields[0], {})[numbers[fields[1]]] = float(fields[2])
        except ValueError:
            raise UserError(f"{path}:{line}: score {fields[2]!r} is no number") from None
    judged = [name for name in relevant if any(gain > 0 for gain in relevant[name].values())]
    if not judged:
        raise UserError(f"{path}: judges no query")
    return Judgements([texts[name] for name in judged], list(passages.values()), [relevant[name] for name in judged],
                      f"{folder.name}/{qrels}", judged, list(passages))


def _by_id(path: Path, text_of: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    """Texts of a .jsonl by `_id`, in its order."""
    found: dict[str, str] = {}
    with opened(path) as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            record = json_object(content, f"{path}:{line}")
            if "_id" not in record:
                raise UserError(f"{path}:{line}: has no _id")
            name = str(record["_id"])
            if name in found:
                raise UserError(f"{path}:{line}: _id {name!r} stands in an earlier line already")
            found[name] = text_of(record)
    return found


@dataclass(frozen=True, slots=True)
class StoredJudgements:
    """The pairs of a split as queries and a pool of passages, as ids without special tokens."""

    queries: list[list[int]]
    passages: list[list[int]]
    relevant: list[dict[int, float]]
    name: str


def judgements_of_split(folder: Path, split: str, *, pool: int | None = None,
                        fill: str | None = "train") -> StoredJudgements:
    """Each query of a split of pairs, judged over all passages of the split: positives and negatives.

    Queries and passages are told apart by their ids, which are equal where the texts are. Up to `pool` passages, those
    of split `fill` are added as distractors, drawn the same way each time; None: the split's own alone. With fewer to
    be had the pool is smaller, and its size is part of the name.

    Raises UserError where there are no such pairs.
    """
    manifest = Manifest.load(folder)
    manifest.require("pairs")
    queries: dict[int, list[int]] = {}
    passages: dict[int, list[int]] = {}
    relevant: dict[int, set[int]] = {}
    for pair in stored_pairs(manifest.split(split)):
        queries.setdefault(pair.query_id, pair.query.tolist())
        passages.setdefault(pair.positive_id, pair.positive.tolist())
        relevant.setdefault(pair.query_id, set()).add(pair.positive_id)
        for number, tokens in zip(pair.negative_ids, pair.negatives, strict=True):
            passages.setdefault(number, tokens.tolist())
    if pool is not None and fill is not None and fill in manifest.splits and fill != split:
        for pair in drawn_pairs(manifest.split(fill)):
            if len(passages) >= pool:
                break
            passages.setdefault(pair.positive_id, pair.positive.tolist())
    numbers = {identity: number for number, identity in enumerate(passages)}
    return StoredJudgements(list(queries.values()), list(passages.values()),
                            [{numbers[p]: 1.0 for p in relevant[q]} for q in queries],
                            f"{folder.name}/{split}, {len(queries)} queries, {len(passages)} passages")
