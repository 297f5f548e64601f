"""Counts of what became of everything that was read, with a few examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from data_prep.reading import SetAside
from pretrain.errors import DataCorruption

EXAMPLES = 3
"""The first ones of each outcome that are kept to be looked at."""
BENIGN = frozenset({"empty", "no_member", "empty_field", "empty_query", "empty_positive", "empty_negative"})
"""Reasons to set something aside that do not mean damage: there is no text."""


@dataclass(slots=True)
class Tally:
    """Documents and UTF-8 bytes by source and by what became of them: kept, a reason to set aside, a step's drop."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """By source and outcome: provenance and detail of the first ones."""
    bad: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source and reason: documents that could not be read."""

    def add(self, source: str, outcome: str, size: int, documents: int = 1) -> None:
        """Count documents of `size` bytes together (0 where they have no text)."""
        entry = self.counts.setdefault(source, {}).setdefault(outcome, {"documents": 0, "bytes": 0})
        entry["documents"] += documents
        entry["bytes"] += size

    def move(self, source: str, before: str, after: str, size: int, documents: int) -> None:
        """Count documents under another outcome than before."""
        self.add(source, before, -size, -documents)
        self.add(source, after, size, documents)

    def set_aside(self, source: str, found: SetAside) -> None:
        """Count what could not be read."""
        self.add(source, found.reason, 0, found.items)
        self.example(source, found.reason, found.provenance, found.detail)
        if found.reason not in BENIGN:
            known = self.bad.setdefault(source, {})
            known[found.reason] = known.get(found.reason, 0) + found.items

    def example(self, source: str, outcome: str, provenance: dict[str, Any], detail: str) -> None:
        """Remember one of the first."""
        known = self.examples.setdefault(source, {}).setdefault(outcome, [])
        if len(known) < EXAMPLES:
            known.append({**provenance, "detail": detail})

    def merge(self, state: dict[str, Any]) -> None:
        """Add what comes after: the `state` of another tally."""
        for source, outcomes in state["counts"].items():
            for outcome, entry in outcomes.items():
                self.add(source, outcome, entry["bytes"], entry["documents"])
        for source, reasons in state["examples"].items():
            for outcome, examples in reasons.items():
                known = self.examples.setdefault(source, {}).setdefault(outcome, [])
                known += examples[:EXAMPLES - len(known)]
        for source, bad in state["bad"].items():
            known_bad = self.bad.setdefault(source, {})
            for reason, documents in bad.items():
                known_bad[reason] = known_bad.get(reason, 0) + documents

    def state(self) -> dict[str, Any]:
        """Plain values for `merge`."""
        return {"counts": self.counts, "examples": self.examples, "bad": self.bad}

    def require_readable(self, found: dict[str, int], max_bad_fraction: float) -> None:
        """Raise DataCorruption where more than a share of what a source holds cannot be read.

        `found` are the documents of each source that could be, dropped ones included.
        """
        for source, reasons in self.bad.items():
            lost = sum(reasons.values())
            total = lost + found.get(source, 0)
            if lost > max_bad_fraction * total:
                reason = max(reasons, key=lambda name: (reasons[name], name))
                raise DataCorruption(
                    f"source {source}: {lost:,} of {total:,} documents cannot be read, max_bad_fraction allows "
                    f"{max_bad_fraction:g}; most are {reason} ({reasons[reason]:,}), as "
                    f"{json.dumps(self.examples[source][reason][0], ensure_ascii=False)}")
