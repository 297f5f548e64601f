"""Reading pairs of query and passage from tables, presets, BEIR folders and packages (see python_pairs.py)."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.pair import Found, Pair, Passage, Rejected
from data_prep.pair_presets import preset_pairs
from data_prep.python_pairs import mine, package_files
from data_prep.reading import FilePart, Meter, SetAside, format_of, matching_files
from data_prep.rows import FORMATS, Where, file_rows, hub_rows, json_row
from data_prep.source_config import BeirSource, PairPresetSource, PairSource, PairTableSource, PythonPairsSource
from data_prep.sources import limited, require_columns, whole_parts
from pretrain.errors import ConfigError


def pair_files(source: PairSource, key: str) -> list[tuple[str, Path]]:
    """(name in provenance, file) of everything a source reads, in order. Raises ConfigError below `key`."""
    if isinstance(source, PythonPairsSource):
        return [(name, path) for name, _, path in package_files(source, key)]
    root = pair_folder(source)
    if root is None:
        return []
    if isinstance(source, PairTableSource | PairPresetSource):
        return _row_files(source, root, key)
    if not root.exists():
        raise ConfigError(f"{key}.path", f"{root} does not exist")
    names = [name for name in ("corpus.jsonl", "queries.jsonl") if not (root / name).is_file()]
    if names:
        raise ConfigError(f"{key}.path", f"{root} is no BEIR folder: {names[0]} is missing")
    judgements = [f"qrels/{name}.tsv" for name in source.qrels] or sorted(
        path.relative_to(root).as_posix() for path in root.glob("qrels/*.tsv"))
    missing = next((name for name in judgements if not (root / name).is_file()), None)
    if missing or not judgements:
        raise ConfigError(f"{key}.qrels", f"{root / (missing or 'qrels/*.tsv')} does not exist")
    return [(name, root / name) for name in ("corpus.jsonl", "queries.jsonl", *judgements)]


def _row_files(source: PairTableSource | PairPresetSource, root: Path, key: str) -> list[tuple[str, Path]]:
    files = matching_files(root, source.glob, key)
    other = next((path for _, path in files if format_of(path) not in FORMATS), None)
    if other is not None:
        raise ConfigError(f"{key}.glob", f"{other} is no {', '.join(FORMATS)} file, plain, .gz or .zst")
    if isinstance(source, PairTableSource):
        named = {field: getattr(source, field) for field in ("query", "positive", "query_id", "positive_id")}
        require_columns(files[0][1], {field: column for field, column in named.items() if column is not None}, key,
                        source.columns)
        for column in source.negatives:
            require_columns(files[0][1], {"negatives": column}, key, source.columns)
    return files


def pair_folder(source: PairSource) -> Path | None:
    """The folder (or single file) a source reads, as an absolute path; of the interpreter, its standard library.

    None where it reads a dataset of the `datasets` library.
    """
    if isinstance(source, PythonPairsSource):
        return Path(source.path or sysconfig.get_paths()["stdlib"]).absolute()
    return None if source.path is None else Path(source.path).absolute()


def read_pairs(source: PairSource, number: int, max_document_bytes: int) -> Iterator[Found]:
    """Everything in one source, in order, up to its limits. Rows with an empty field are set aside.

    Raises ConfigError where it holds no file or a table lacks a column.
    """
    parts: list[FilePart | None] = [*whole_parts(pair_files(source, f"sources.{number}"))] or [None]
    return limited(read_pair_parts(source, number, parts, max_document_bytes), source)


def read_pair_parts(source: PairSource, number: int, parts: Iterable[FilePart | None], limit: int,
                    meter: Meter | None = None) -> Iterator[Found]:
    """Pairs of parts of a source; the part of a source without files is None, or holds rows [start, stop)."""
    for item in _items(source, number, parts, limit, meter):
        yield _check(item, limit) if isinstance(item, Pair) else item


def _items(source: PairSource, number: int, parts: Iterable[FilePart | None], limit: int,
           meter: Meter | None) -> Iterator[Found]:
    key = f"sources.{number}"
    if isinstance(source, BeirSource):
        yield from _beir(source, number, key)
    elif isinstance(source, PythonPairsSource):
        for part in parts:
            assert part is not None  # it reads files
            yield from _mined(source, number, part, limit)
            if meter is not None:
                meter.bytes += part.size
    else:
        rows = _rows(source, parts, limit, key, meter)
        if isinstance(source, PairPresetSource):
            yield from preset_pairs(source, number, rows)
        else:
            for here, row in rows:
                yield row if isinstance(row, SetAside) else _pair_of(row, source, number, here)


def _rows(source: PairTableSource | PairPresetSource, parts: Iterable[FilePart | None], limit: int, key: str,
          meter: Meter | None) -> Iterator[tuple[Where, dict[str, Any] | SetAside]]:
    where = {"source": source.name}
    for part in parts:
        if source.dataset is not None:
            start, stop = (0, None) if part is None else (part.start, part.stop)
            yield from hub_rows(source.dataset, where, start, stop, key)
        elif part is not None:
            yield from file_rows(part, where | {"path": part.name}, limit, header=getattr(source, "columns", None),
                                 meter=meter)


def _mined(source: PythonPairsSource, number: int, part: FilePart, limit: int) -> Iterator[Found]:
    where = {"source": source.name, "path": part.name}
    inside = part.name.removeprefix("stdlib/").removeprefix("site-packages/") if source.path is None else part.name
    package = inside.split("/")[0].removesuffix(".py")
    for item in mine(part.path, source, limit):
        if isinstance(item, tuple):
            yield SetAside(where, *item)
        elif isinstance(item, str):
            yield Rejected(item)
        else:
            found = where | {"line": item.line, "function": item.name}
            yield Pair(Passage(item.summary), Passage(item.body), (), number, found, group=package)


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
    nul = next((name for name, passage in named if "\0" in passage.text), None)
    if nul:
        return SetAside(pair.provenance, "nul_bytes", f"in the {nul}")
    query, positive, *negatives = (Passage(p.text.strip("\n\r\t "), p.id, p.score) for _, p in named)
    return Pair(query, positive, tuple(negatives), pair.source, pair.provenance, pair.group, pair.split, pair.unordered)


def _pair_of(row: dict[str, Any], source: PairTableSource, number: int, where: Where) -> Pair | SetAside:
    """The pair of a row. A column of negatives holds a text or a list of texts; null or left out means none."""
    negatives: list[Any] = []
    for column in source.negatives:
        value = row.get(column)
        negatives += value if isinstance(value, list) else [] if value is None else [value]
    missing = next((column for column in (source.query, source.positive) if column not in row), None)
    if missing is not None:
        return SetAside(where, "no_column", f'no "{missing}"; it has {", ".join(map(str, row))}')
    query, positive = ("" if row[c] is None else row[c] for c in (source.query, source.positive))
    other = next((value for value in (query, positive, *negatives) if not isinstance(value, str)), None)
    if other is not None:
        return SetAside(where, "no_text", f"a field is {type(other).__name__}, not text")
    query_id, positive_id = (None if c is None or row.get(c) in (None, "") else str(row[c])
                             for c in (source.query_id, source.positive_id))
    return Pair(Passage(query, query_id), Passage(positive, positive_id), tuple(map(Passage, negatives)), number, where)


def _beir(source: BeirSource, number: int, key: str) -> Iterator[Found]:
    """Pairs of a BEIR folder in the order of its judgements; only the texts that these name are held in memory."""
    root = Path(source.path).absolute()
    judgements = [(name, path) for name, path in pair_files(source, key) if path.suffix == ".tsv"]
    rows: list[tuple[Where, str, str, float]] = []
    for name, path in judgements:
        for found in _judgements(path, {"source": source.name, "path": name}):
            if isinstance(found, SetAside):
                yield found
            else:
                rows.append(found)
    queries = yield from _texts(root / "queries.jsonl", {row[1] for row in rows}, source.name)
    corpus = yield from _texts(root / "corpus.jsonl", {row[2] for row in rows}, source.name)
    refused: dict[str, list[Passage]] = {}
    for _, query, passage, relevance in rows:
        if relevance <= 0 and passage in corpus:
            refused.setdefault(query, []).append(Passage(corpus[passage], passage, relevance))
    for where, query, passage, relevance in rows:
        if query not in queries or passage not in corpus:
            unknown = query if query not in queries else passage
            yield SetAside(where, "unknown_id", f'no text has the id "{unknown}"')
        elif relevance > 0:
            yield Pair(Passage(queries[query], query), Passage(corpus[passage], passage), tuple(refused.get(query, ())),
                       number, where)


def _judgements(path: Path, where: Where) -> Iterator[tuple[Where, str, str, float] | SetAside]:
    """(provenance, id of the query, id of the passage, relevance) of each line of a file but its header."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for line, content in enumerate(file, 1):
            fields = content.rstrip("\r\n").split("\t")
            try:
                query, passage, score = fields
                relevance = float(score)
                if not math.isfinite(relevance):
                    raise ValueError
                yield where | {"line": line}, query, passage, relevance
            except ValueError:
                if content.strip() and not (line == 1 and _is_header(fields)):
                    yield SetAside(where | {"line": line}, "bad_row", "not query-id, corpus-id, score")


def _is_header(fields: list[str]) -> bool:
    """Whether fields are three names, as query-id, corpus-id and score: none is empty or holds a digit."""
    return len(fields) == 3 and all(name.strip() and not any(map(str.isdigit, name)) for name in fields)


def _texts(path: Path, wanted: set[str], source: str) -> Generator[SetAside, None, dict[str, str]]:
    """id -> text (title and text of a passage) of the wanted lines, as the generator's return value."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            where = {"source": source, "path": path.name, "line": line}
            record = json_row(content, where) if content.strip() else None
            if isinstance(record, SetAside):
                yield record
            elif record is not None:
                number = record.get("_id")
                parts = ["" if record.get(name) is None else record[name] for name in ("title", "text")]
                if not isinstance(number, str | int) or isinstance(number, bool):
                    yield SetAside(where, "bad_row", f"_id is {type(number).__name__}, neither text nor number")
                elif str(number) in wanted and not all(isinstance(part, str) for part in parts):
                    yield SetAside(where, "bad_row", "title or text is no text")
                elif str(number) in wanted:
                    found[str(number)] = " ".join(parts).strip()
    return found
