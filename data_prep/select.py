"""Which documents are kept and to which split each belongs: functions of a document's own text and the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.config import TRAIN, PairSourceBase, PrepConfig
from data_prep.sources import Document, SetAside, read_source

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Tally:
    """Documents and UTF-8 bytes by source and by what became of them: kept, duplicate, or a reason of `SetAside`."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def add(self, source: str, outcome: str, size: int) -> None:
        """Count one document of `size` bytes (0 where it has no text)."""
        entry = self.counts.setdefault(source, {}).setdefault(outcome, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += size


    def move(self, source: str, before: str, after: str, size: int) -> None:
        """Count one document under another outcome than before."""
        entry = self.counts[source][before]
        entry["documents"] -= 1
        entry["bytes"] -= size
        self.add(source, after, size)


@dataclass(frozen=True, slots=True)
class Kept:
    """A document of the dataset."""

    document: Document
    digest: bytes
    """16 bytes: hash of the normalised text."""
    split: str

    @property
    def texts(self) -> list[bytes]:
        """What is tokenized: the one text."""
        return [self.document.text]

    @property
    def doc_hash(self) -> int:
        """Signed 64-bit form of the digest, as shards keep it."""
        return int.from_bytes(self.digest[:8], "little", signed=True)


def digest_of(text: bytes) -> bytes:
    """16-byte hash of a document, blind to a byte order mark, CRLF and outer white space."""
    normalised = text.removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n").strip()
    return hashlib.blake2b(normalised, digest_size=16).digest()


def keyed_hash(digest: bytes, seed: int, purpose: str) -> int:
    """Uniform in [0, 2^64), independent for each purpose (at most 16 characters)."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key, person=purpose.encode()).digest(), "little")


class Splitter:
    """Assigns a document to a split by its hash: the same one whatever else the corpus holds.

    Splits take consecutive parts of [0, 1) in the order they are given, train takes the rest: adding a split after the
    others moves documents out of train only.
    """

    def __init__(self, shares: dict[str, float], seed: int) -> None:
        self.seed = seed
        self.bounds: list[tuple[int, str]] = []
        upper = 0.0
        for name, share in shares.items():
            upper += share
            self.bounds.append((int(upper * 2**64), name))

    def split_of(self, digest: bytes) -> str:
        """Name of the split."""
        place = keyed_hash(digest, self.seed, "split")
        return next((name for bound, name in self.bounds if place < bound), TRAIN)

    @property
    def rule(self) -> str:
        """The rule in words and numbers, for the manifest."""
        parts = "; ".join(f"{name} below {bound}" for bound, name in self.bounds)
        return (f"blake2b-64(blake2b-128(text without byte order mark, CRLF as LF, stripped), key=seed {self.seed}, "
                f"person=split), little-endian: {parts + '; ' if parts else ''}{TRAIN} otherwise")


def select(config: PrepConfig, tally: Tally) -> Iterator[Kept | SetAside]:
    """Read all sources in order and drop copies. Memory grows by one digest for each distinct document."""
    splitter = Splitter(config.splits, config.seed)
    seen: set[bytes] = set()
    for number, source in enumerate(config.sources):
        assert not isinstance(source, PairSourceBase)  # PrepConfig mixes no kinds
        for item in read_source(source, number, config.max_document_bytes):
            if isinstance(item, SetAside):
                tally.add(source.name, item.reason, 0)
                yield item
                continue
            digest = digest_of(item.text)
            if config.dedup.exact:
                if digest in seen:
                    tally.add(source.name, "duplicate", len(item.text))
                    continue
                seen.add(digest)
            tally.add(source.name, "kept", len(item.text))
            yield Kept(item, digest, splitter.split_of(digest))
