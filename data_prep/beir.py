"""A split of pairs as a BEIR folder of whole texts, for retrievers with tokenizers and rules of their own.

Shards hold ids. A tokenizer on bytes gives the text back; of one that does not, the text of mined pairs is mined again
from the packages, and held to the stored ids. Queries and passages are those of the task `retrieval` on the split:
equal texts once, all passages of the split, then those of split train up to `pool`.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.config import TRAIN
from data_prep.files import write_atomic
from data_prep.manifest import TOKENIZER, Manifest
from data_prep.pairs import TokenPair, drawn_pairs, stored_pairs
from data_prep.python_pairs import Mined, mine, package_files
from data_prep.source_config import PythonPairsSource
from data_prep.tokenizer import load_tokenizer, token_bytes
from pretrain.errors import DataCorruption, UserError

Texts = Callable[[TokenPair], tuple[str, str]]
_MAX_BYTES = 1 << 30


@dataclass
class BeirCounts:
    """What was written."""

    queries: int = 0
    passages: int = 0
    added: int = 0
    """Of the passages: from split train."""


@dataclass
class _Mined:
    """Texts of the mined pairs of a source by file and line; a file is parsed once, pairs of a file stand together."""

    rules: PythonPairsSource
    files: dict[str, Path]
    path: str = ""
    found: dict[int, tuple[str, str]] = field(default_factory=dict)

    def text(self, stated: dict[str, Any]) -> tuple[str, str]:
        """Summary and body of the function that a pair came from."""
        path, line = str(stated["path"]), int(stated["line"])
        if path not in self.files:
            raise UserError(f"{path}: is not among the packages here, from which its text would be mined again")
        if path != self.path:
            items = mine(self.files[path], self.rules, _MAX_BYTES)
            self.path = path
            self.found = {item.line: (item.summary, item.body) for item in items if isinstance(item, Mined)}
        if line not in self.found:
            raise DataCorruption(f"{self.files[path]}:{line}: no function is mined here any more; the package changed")
        query, positive = (text.strip("\n\r\t ") for text in self.found[line])
        return query, positive


def _mined_sources(manifest: Manifest) -> dict[str, _Mined]:
    """The sources of a dataset that mine packages, by name."""
    made = manifest.provenance
    found = {}
    for stated in made.get("config", {}).get("sources", []):
        if stated.get("kind") == "python_pairs":
            path = made["paths"][stated["name"]]
            own = str(Path(sysconfig.get_paths()["stdlib"]).absolute())
            fields = {key: value for key, value in stated.items() if key in PythonPairsSource.model_fields}
            rules = PythonPairsSource.model_validate({**fields, "path": None if path == own else path})
            found[rules.name] = _Mined(rules, {name: file for name, _, file in package_files(rules, "source")})
    return found


def _texts(manifest: Manifest, tokenizer: Tokenizer) -> Texts:
    """What gives back the query and the positive of a stored pair."""
    if token_bytes(tokenizer) is not None:
        return lambda pair: (tokenizer.decode(pair.query.tolist()), tokenizer.decode(pair.positive.tolist()))
    sources = _mined_sources(manifest)

    def mined(pair: TokenPair) -> tuple[str, str]:
        stated = json.loads(pair.provenance) if isinstance(pair.provenance, bytes) else pair.provenance
        if stated["source"] not in sources:
            raise UserError(f"{manifest.folder}: its tokenizer does not give texts back, and source {stated['source']} "
                            "is not mined from packages; prepare it with a tokenizer on bytes")
        found = sources[stated["source"]].text(stated)
        for text, stored in zip(found, (pair.query, pair.positive), strict=True):
            if tokenizer.encode(text, add_special_tokens=False).ids != stored.tolist():
                raise DataCorruption(f"{stated['path']}:{stated['line']}: has another text than was stored; the "
                                     "package changed")
        return found
    return mined


def write_beir(dataset: Path, split: str, out: Path, *, pool: int | None = None) -> BeirCounts:
    """Write corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.

    Args:
        dataset: folder of pairs.
        split: whose queries are judged.
        out: folder to write.
        pool: passages, filled up with those that `pretrain eval --pool` draws from split train; None: those of the
            split alone.

    Raises:
        UserError: no pairs, no such split, or texts that cannot be had.
        DataCorruption: a text is not the one that was stored.
    """
    manifest = Manifest.load(dataset)
    manifest.require("pairs")
    tokenizer = load_tokenizer(dataset / TOKENIZER)
    texts = _texts(manifest, tokenizer)
    queries: dict[int, str] = {}
    passages: dict[int, str] = {}
    judged: dict[tuple[int, int], None] = {}
    for pair in stored_pairs(manifest.split(split)):
        query, positive = texts(pair)
        queries.setdefault(pair.query_id, query)
        passages.setdefault(pair.positive_id, positive)
        judged[pair.query_id, pair.positive_id] = None
        for number, tokens in zip(pair.negative_ids, pair.negatives, strict=True):
            passages.setdefault(number, tokenizer.decode(tokens.tolist()))
    counts = BeirCounts(len(queries), len(passages))
    if pool is not None and split != TRAIN and TRAIN in manifest.splits:
        for pair in drawn_pairs(manifest.split(TRAIN)):
            if len(passages) >= pool:
                break
            passages.setdefault(pair.positive_id, texts(pair)[1])
    counts.added, counts.passages = len(passages) - counts.passages, len(passages)
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    write_atomic(out / "queries.jsonl", _lines({"_id": f"q{n:x}", "text": text} for n, text in queries.items()))
    write_atomic(out / "corpus.jsonl", _lines({"_id": f"p{n:x}", "title": "", "text": text}
                                              for n, text in passages.items()))
    rows = "".join(f"q{q:x}\tp{p:x}\t1\n" for q, p in judged)
    write_atomic(out / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore\n" + rows).encode())
    return counts


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
