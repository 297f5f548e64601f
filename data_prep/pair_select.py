"""Which pairs are kept and to which split each belongs.

A split is drawn by the keyed hash of the query, or of the package of a mined pair, so that whole queries and whole
packages go to one split. What would stand in two all the same (one summary in two packages, a vendored copy of a
function, a source whose split is given) stays where it came first and is dropped from the other: no query of any source
and, of mined pairs, no package and no body is in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.config import PairSourceBase, PrepConfig
from data_prep.encode import Ids
from data_prep.pair_sources import Pair, Passage, Rejected, read_pairs
from data_prep.pairs import PairWriter, TokenPair
from data_prep.select import Kept, Splitter, Tally, digest_of
from data_prep.sources import Document, SetAside


@dataclass(frozen=True, slots=True)
class KeptPair:
    """A pair of the dataset."""

    pair: Pair
    digest: bytes
    """16 bytes: hash of query and positive."""
    split: str
    texts: list[bytes]
    """UTF-8 of query, positive and negatives."""


def select_pairs(config: PrepConfig, tally: Tally) -> Iterator[KeptPair | SetAside]:
    """Read all sources in order, drop copies and what would stand in two splits.

    Memory grows by a digest for each distinct pair and query, and each package and body of mined pairs.
    """
    splitter = Splitter(config.splits, config.seed)
    seen: set[bytes] = set()
    homes: dict[tuple[str, bytes], str] = {}
    for number, source in enumerate(config.sources):
        assert isinstance(source, PairSourceBase)  # PrepConfig mixes no kinds
        for item in read_pairs(source, number, config.max_document_bytes):
            if isinstance(item, Rejected | SetAside):
                tally.add(source.name, item.reason, 0)
                if isinstance(item, SetAside):
                    yield item
                continue
            texts = item.texts
            size = sum(map(len, texts))
            query, positive = map(digest_of, texts[:2])
            digest = hashlib.blake2b(query + positive, digest_size=16).digest()
            if config.dedup.exact and digest in seen:
                tally.add(source.name, "duplicate", size)
                continue
            group = None if item.group is None else digest_of(item.group.encode())
            split = source.split or splitter.split_of(group or query)
            keys = [("query", query), *([("package", group), ("passage", positive)] if group else [])]
            other = next((name for name, key in keys if homes.get((name, key), split) != split), None)
            if other is not None:
                tally.add(source.name, f"{other}_in_other_split", size)
                continue
            seen.add(digest)
            homes.update((key, split) for key in keys)
            tally.add(source.name, "kept", size)
            yield KeptPair(item, digest, split, texts)


def as_document(kept: KeptPair) -> Kept:
    """All texts of a pair as one document, for the training of a tokenizer."""
    return Kept(Document(b"\n".join(kept.texts), kept.pair.source, kept.pair.provenance), kept.digest, kept.split)


def push_pair(writer: PairWriter, kept: KeptPair, ids: list[Ids], source: str, tally: Tally) -> None:
    """Write a pair whose texts have these ids. One with a text that the tokenizer leaves nothing of is only counted."""
    size = sum(map(len, kept.texts))
    if not all(map(len, ids)):
        tally.move(source, "kept", "no_tokens", size)
        return
    passages = (kept.pair.query, kept.pair.positive, *kept.pair.negatives)
    query_id, positive_id, *negative_ids = (
        text_id(passage, text, source) for passage, text in zip(passages, kept.texts, strict=True))
    query, positive, *negatives = ids
    scores = [passage.score for passage in kept.pair.negatives]
    writer.push(TokenPair(query, positive, negatives, query_id, positive_id, negative_ids, scores,
                          kept.pair.provenance | {"bytes": size}), size)


def text_id(passage: Passage, text: bytes, source: str) -> int:
    """64-bit id of a text: hash of the source's name and its id there, else of the text."""
    if passage.id is None:
        return int.from_bytes(digest_of(text)[:8], "little")
    named = f"{source}\0{passage.id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8, person=b"id").digest(), "little")


def split_rule(config: PrepConfig) -> str:
    """The rule of the splits in words and numbers, for the manifest."""
    given = "".join(f"{source.name}: {source.split}; " for source in config.sources
                    if isinstance(source, PairSourceBase) and source.split)
    rule = Splitter(config.splits, config.seed).rule
    return (f"{given}else of the query, or of the package of a mined pair: {rule}; a query, package or mined passage "
            "in two splits stays where it came first")
