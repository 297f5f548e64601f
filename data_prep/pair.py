"""A pair as it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.reading import SetAside


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
    split: str | None = None
    """Split that the source's rules give it; None: by hash."""
    unordered: bool = False
    """Whether the same two texts the other way round are a copy."""

    @property
    def texts(self) -> list[bytes]:
        """UTF-8 of query, positive and negatives."""
        return [passage.text.encode() for passage in (self.query, self.positive, *self.negatives)]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that a rule of its source turned down: counted, not kept in the quarantine."""

    reason: str


Found = Pair | SetAside | Rejected
