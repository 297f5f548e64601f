"""What preparation carries from reading to writing: a document or a pair after cleaning, with its hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from data_prep.clean import Cleaner, Dropped
from data_prep.config import PrepConfig
from data_prep.pair import Pair, Passage
from data_prep.sources import Document
from data_prep.split import Splitter, digest_of

QUERY, PACKAGE, PASSAGE = range(3)
HOME_NAMES = ("query", "package", "passage")
"""What must not stand in two splits, by kind."""


@dataclass(frozen=True, slots=True)
class Item:
    """A document (one text) or a pair (query, positive, negatives)."""

    texts: list[bytes]
    source: int
    provenance: dict[str, Any]
    digest: bytes
    """16 bytes: equal for exact copies."""
    split: str
    homes: dict[int, bytes] = field(default_factory=dict)
    """Kind -> 16-byte hash of what belongs to one split only. Pairs alone have any."""
    ids: list[int] = field(default_factory=list)
    """Of pairs, 64-bit id of each text."""
    scores: list[float] = field(default_factory=list)
    """Of pairs, score of each text; NaN where the source gives none."""

    @property
    def size(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(map(len, self.texts))


def item_of(found: Document | Pair, config: PrepConfig, splitter: Splitter, cleaner: Cleaner) -> Item | Dropped:
    """The cleaned item, or the step that drops it."""
    source = config.sources[found.source]
    if isinstance(found, Document):
        text = cleaner.document(found.text)
        if isinstance(text, Dropped):
            return text
        digest = digest_of(text)
        return Item([text], found.source, found.provenance, digest, source.split or splitter.split_of(digest))
    texts = [cleaner.rewrite(text) for text in found.texts]
    if not all(text.strip() for text in texts):
        return Dropped("nothing_left", "cleaning leaves only white space of a text")
    query, positive = map(digest_of, texts[:2])
    group = None if found.group is None else digest_of(found.group.encode())
    homes = {QUERY: query} if group is None else {QUERY: query, PACKAGE: group, PASSAGE: positive}
    split = source.split or found.split or splitter.split_of(group or query)
    both = [query, positive]
    if found.unordered:
        both = sorted(digest_of(b" ".join(text.decode().lower().encode().split())) for text in texts[:2])
    passages = (found.query, found.positive, *found.negatives)
    return Item(texts, found.source, found.provenance, hashlib.blake2b(b"".join(both), digest_size=16).digest(), split,
                homes, [text_id(passage, text, source.name) for passage, text in zip(passages, texts, strict=True)],
                [float("nan") if passage.score is None else passage.score for passage in passages])


def text_id(passage: Passage, text: bytes, source: str) -> int:
    """64-bit id of a text: hash of the source's name and its id there, else of the text."""
    if passage.id is None:
        return int.from_bytes(digest_of(text)[:8], "little")
    named = f"{source}\0{passage.id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8, person=b"id").digest(), "little")


def split_rule(config: PrepConfig) -> str:
    """The rule of the splits in words and numbers, for the manifest."""
    rule = Splitter(config.splits, config.seed).rule
    given = "".join(f"{source.name}: {source.split}; " for source in config.sources if source.split)
    if config.kind == "documents":
        return f"{given}else {rule}" if given else rule
    return (f"{given}else of the query, or of the package of a mined pair: {rule}; a query, package or mined passage "
            "belongs to the split where it came first and is dropped from the others")
