"""What embeddings are judged on: pairs of texts with scores, and queries with judged passages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest
from data_prep.pairs import drawn_pairs, stored_pairs
from data_prep.reading import open_text
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
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: is no row of sentence1, sentence2, score (a number): {str(row)[:100]}") from None
        found.first.append(str(first))
        found.second.append(str(second))
        found.scores.append(score)
    if len(found.scores) < 2:
        raise UserError(f"{path}: holds {len(found.scores)} pairs; a correlation needs two at least")
    return found


def _scored_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst", ".zstd")), "")
    if path.is_dir() or suffix == ".parquet":
        from datasets import Dataset, load_from_disk
        table = load_from_disk(str(path)) if path.is_dir() else Dataset.from_parquet(str(path))
        for number, row in enumerate(table):
            yield f"{path}, row {number}", _named(row)
        return
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{path}: .csv, .tsv, .jsonl, .parquet or a folder of `datasets` would be right")
    with open_text(path) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        if suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _named(_json(line, f"{path}:{number}"))
            return
        reader = csv.reader(lines, delimiter="," if suffix == ".csv" else "\t",
                            quoting=csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE)
        names = ["sentence1", "sentence2", "score"]
        for number, fields in enumerate(reader, 1):
            if number == 1 and "sentence1" in fields:
                names = fields
            elif fields:
                yield f"{path}:{number}", _named(dict(zip(names, fields, strict=False)))


def _named(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its score under the one name."""
    name = next((name for name in _SCORE_NAMES if name in row), None)
    return {**row, "score": row[name]} if name else row


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object: {line[:100]}")
    return value


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
    passages = {record["_id"]: f"{record.get('title') or ''} {record.get('text') or ''}".strip()
                for record in _records(folder / "corpus.jsonl")}
    texts = {record["_id"]: str(record.get("text") or "") for record in _records(folder / "queries.jsonl")}
    numbers = {name: number for number, name in enumerate(passages)}
    relevant: dict[str, dict[int, float]] = {}
    path = folder / "qrels" / f"{qrels}.tsv"
    for line, content in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = content.split("\t")
        if line == 1 or not content.strip():  # the first line is a header
            continue
        if len(fields) != 3 or fields[0] not in texts or fields[1] not in numbers:
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


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line, content in enumerate(file, 1):
            if content.strip():
                record = _json(content, f"{path}:{line}")
                if "_id" not in record:
                    raise UserError(f"{path}:{line}: has no _id")
                yield {**record, "_id": str(record["_id"])}


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
