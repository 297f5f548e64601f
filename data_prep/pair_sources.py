"""Reading pairs of query and passage from tables, BEIR folders and packages (see python_pairs.py)."""

from __future__ import annotations

import csv
import io
import json
import sysconfig
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from data_prep.config import BeirSource, PairSource, PairTableSource, PythonPairsSource
from data_prep.python_pairs import mine, package_files
from data_prep.sources import SetAside, matching_files, open_text
from pretrain.errors import ConfigError

FIELD_BYTES = 1 << 28
"""Longest field of a csv file. The library's own limit of 131,072 characters is less than a long page."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text of a source, with the id it has there (None: none) and, for negatives, its score."""

    text: str
    id: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, a passage that answers it and passages that do not."""

    query: Passage
    positive: Passage
    negatives: tuple[Passage, ...]
    source: int
    provenance: dict[str, Any]
    group: str | None = None
    """What must not be divided between splits beside the query: the package of a mined function."""

    @property
    def texts(self) -> list[bytes]:
        """UTF-8 of query, positive and negatives."""
        return [passage.text.encode() for passage in (self.query, self.positive, *self.negatives)]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that a rule of its source turned down: counted, not kept in the quarantine."""

    reason: str


Found = Pair | SetAside | Rejected


def pair_files(source: PairSource, key: str) -> list[tuple[str, Path]]:
    """(name in provenance, file) of everything a source reads, in order. Raises ConfigError below `key`."""
    if isinstance(source, PythonPairsSource):
        return [(name, path) for name, _, path in package_files(source, key)]
    root = pair_folder(source)
    if not root.exists():
        raise ConfigError(f"{key}.path", f"{root} does not exist")
    if isinstance(source, PairTableSource):
        return matching_files(root, source.glob, key)
    names = [name for name in ("corpus.jsonl", "queries.jsonl") if not (root / name).is_file()]
    if names:
        raise ConfigError(f"{key}.path", f"{root} is no BEIR folder: {names[0]} is missing")
    judgements = [f"qrels/{name}.tsv" for name in source.qrels] or sorted(
        path.relative_to(root).as_posix() for path in root.glob("qrels/*.tsv"))
    missing = next((name for name in judgements if not (root / name).is_file()), None)
    if missing or not judgements:
        raise ConfigError(f"{key}.qrels", f"{root / (missing or 'qrels/*.tsv')} does not exist")
    return [(name, root / name) for name in ("corpus.jsonl", "queries.jsonl", *judgements)]


def pair_folder(source: PairSource) -> Path:
    """The folder (or single file) a source reads, as an absolute path; of the interpreter, its standard library."""
    return Path(source.path or sysconfig.get_paths()["stdlib"]).absolute()


def read_pairs(source: PairSource, number: int, max_document_bytes: int) -> Iterator[Found]:
    """Everything in one source, in order, up to its limits. Rows with an empty field are set aside.

    Raises ConfigError where it holds no file or a table lacks a column.
    """
    pairs = total = 0
    for item in _items(source, number, max_document_bytes):
        checked = _check(item, max_document_bytes) if isinstance(item, Pair) else item
        if isinstance(checked, Pair):
            pairs += 1
            total += sum(map(len, checked.texts))
            if source.max_bytes is not None and total > source.max_bytes:
                return
        yield checked
        if pairs == source.max_documents:
            return


def _items(source: PairSource, number: int, limit: int) -> Iterator[Found]:
    key = f"sources.{number}"
    if isinstance(source, BeirSource):
        yield from _beir(source, number, key)
    elif isinstance(source, PythonPairsSource):
        for name, package, path in package_files(source, key):
            where = {"source": source.name, "path": name}
            for item in mine(path, source, limit):
                if isinstance(item, tuple):
                    yield SetAside(where, *item)
                elif isinstance(item, str):
                    yield Rejected(item)
                else:
                    found = where | {"line": item.line, "function": item.name}
                    yield Pair(Passage(item.summary), Passage(item.body), (), number, found, group=package)
    else:
        for name, path in pair_files(source, key):
            where = {"source": source.name, "path": name}
            for here, row in _rows(path, where, source, key):
                yield row if isinstance(row, SetAside) else _pair_of(row, source, number, here)


def _check(pair: Pair, limit: int) -> Pair | SetAside:
    """The pair with texts stripped, or why it is none."""
    named = [("query", pair.query), ("positive", pair.positive), *(("negative", passage) for passage in pair.negatives)]
    try:
        size = sum(len(passage.text.encode()) for _, passage in named)
    except UnicodeEncodeError as error:
        return SetAside(pair.provenance, "not_utf8", f"lone surrogate or broken byte at character {error.start}")
    if size > limit:
        return SetAside(pair.provenance, "too_large", f"{size} bytes, max_document_bytes is {limit}")
    empty = next((name for name, passage in named if not passage.text.strip()), None)
    if empty:
        return SetAside(pair.provenance, f"empty_{empty}", "nothing but white space")
    query, positive, *negatives = (Passage(p.text.strip("\n\r\t "), p.id, p.score) for _, p in named)
    return Pair(query, positive, tuple(negatives), pair.source, pair.provenance, pair.group)


def _rows(path: Path, where: dict[str, Any], source: PairTableSource,
          key: str) -> Iterator[tuple[dict[str, Any], dict[str, Any] | SetAside]]:
    """(provenance, fields by name) of each row of a csv, tsv or jsonl file; what cannot be read is set aside."""
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst", ".zstd")), "")
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise ConfigError(f"{key}.glob", f"{path} is no .csv, .tsv or .jsonl file, plain, .gz or .zst")
    line = 0
    try:
        with open_text(path) as stream:
            if suffix == ".jsonl":
                for content in stream:
                    line += 1
                    if content.strip():
                        here = where | {"line": line}
                        yield here, _json_row(content, here)
                return
            csv.field_size_limit(FIELD_BYTES)
            # Bytes that are no UTF-8 become lone surrogates, which `_check` finds: one bad row costs one row.
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",",
                                   quoting=csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE)
            _check_columns(path, list(table.fieldnames or []), source, key)
            for row in table:
                line = table.line_num
                yield where | {"line": line}, row
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, csv.Error) as error:
        here = where | {"line": line + 1}
        yield here, SetAside(here, "unreadable", str(error))


def _check_columns(path: Path, found: list[str], source: PairTableSource, key: str) -> None:
    for field in ("query", "positive", "query_id", "positive_id"):
        column = getattr(source, field)
        if column is not None and column not in found:
            raise ConfigError(f"{key}.{field}", f'{path} has no column "{column}"; it has {", ".join(found) or "none"}')
    for column in source.negatives:
        if column not in found:
            raise ConfigError(f"{key}.negatives", f'{path} has no column "{column}"; it has {", ".join(found)}')


def _json_row(content: bytes, where: dict[str, Any]) -> dict[str, Any] | SetAside:
    try:
        record = json.loads(content)
    except UnicodeDecodeError as error:
        return SetAside(where, "not_utf8", f"byte {content[error.start]:#04x} at offset {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return SetAside(where, "bad_json", str(error))
    if isinstance(record, list):
        return {str(i): value for i, value in enumerate(record)}
    return record if isinstance(record, dict) else SetAside(where, "bad_json", "neither an object nor a list")


def _pair_of(row: dict[str, Any], source: PairTableSource, number: int, where: dict[str, Any]) -> Pair | SetAside:
    """The pair of a row. A column of negatives holds a text or a list of texts; null or left out means none."""
    negatives: list[Any] = []
    for column in source.negatives:
        value = row.get(column)
        negatives += value if isinstance(value, list) else [] if value is None else [value]
    query, positive = ("" if row.get(c) is None else row[c] for c in (source.query, source.positive))
    other = next((value for value in (query, positive, *negatives) if not isinstance(value, str)), None)
    if other is not None:
        return SetAside(where, "no_text", f"a field is {type(other).__name__}, not text")
    query_id, positive_id = (None if c is None or row.get(c) in (None, "") else str(row[c])
                             for c in (source.query_id, source.positive_id))
    return Pair(Passage(query, query_id), Passage(positive, positive_id), tuple(map(Passage, negatives)), number, where)


def _beir(source: BeirSource, number: int, key: str) -> Iterator[Found]:
    """Pairs of a BEIR folder in the order of its judgements; only the texts that these name are held in memory."""
    root = pair_folder(source)
    judgements = [(name, path) for name, path in pair_files(source, key) if path.suffix == ".tsv"]
    rows: list[tuple[dict[str, Any], str, str, int]] = []
    for name, path in judgements:
        where = {"source": source.name, "path": name}
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for line, content in enumerate(file, 1):
                fields = content.rstrip("\r\n").split("\t")
                try:
                    query, passage, score = fields
                    rows.append((where | {"line": line}, query, passage, int(score)))
                except ValueError:
                    if line > 1 and content.strip():  # the first line is a header
                        yield SetAside(where | {"line": line}, "bad_row", "not query-id, corpus-id, whole-number score")
    queries = yield from _texts(root / "queries.jsonl", {row[1] for row in rows}, source.name)
    corpus = yield from _texts(root / "corpus.jsonl", {row[2] for row in rows}, source.name)
    refused: dict[str, list[Passage]] = {}
    for _, query, passage, relevance in rows:
        if relevance <= 0 and passage in corpus:
            refused.setdefault(query, []).append(Passage(corpus[passage], passage, float(relevance)))
    for where, query, passage, relevance in rows:
        if query not in queries or passage not in corpus:
            unknown = query if query not in queries else passage
            yield SetAside(where, "unknown_id", f'no text has the id "{unknown}"')
        elif relevance > 0:
            yield Pair(Passage(queries[query], query), Passage(corpus[passage], passage), tuple(refused.get(query, ())),
                       number, where)


def _texts(path: Path, wanted: set[str], source: str) -> Generator[SetAside, None, dict[str, str]]:
    """id -> text (title and text of a passage) of the wanted lines, as the generator's return value."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            where = {"source": source, "path": path.name, "line": line}
            record = _json_row(content, where) if content.strip() else {}
            if isinstance(record, SetAside):
                yield record
            elif str(record.get("_id")) in wanted:
                title, text = (record.get(name) or "" for name in ("title", "text"))
                found[str(record["_id"])] = f"{title} {text}".strip()
    return found
