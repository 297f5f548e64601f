"""Training items that hold text of evaluation sets: which, how much of what, and what is only boilerplate."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.clean_config import DecontaminateConfig
from data_prep.corpus import CONTAMINATED, KEPT, Corpus, Verdicts
from data_prep.evaluation_sets import load_items, load_set_aside
from data_prep.files import canonical_json
from data_prep.ngrams import GramCounts, Hits, NgramIndex, Overlap
from data_prep.words import excerpt

BOILERPLATE_EXAMPLES = 20
EXCERPT_WORDS = 30


def drop_contaminated(corpus: Corpus, found: Verdicts, config: DecontaminateConfig, folder: Path,
                      report: Path) -> dict[str, Any]:
    """Drop every item one of whose texts holds too much of an evaluation item.

    `folder` holds the index; `report` gets a JSON line for each item that is dropped, in their order. Returns figures
    by evaluation set: items, how many the corpus covers and touches (dropped or not), what was dropped for them.
    """
    index, items = NgramIndex.load(folder), load_items(folder)
    counts = GramCounts(index)
    for _, unit, verdict in corpus:
        alive = verdict[unit["hit_item"]] == KEPT
        counts.add(Hits(unit["hit_item"][alive], unit["hit_text"][alive], unit["hit_gram"][alive]))
    matched = counts.matched(config.boilerplate)
    dropped: Counter[str] = Counter()
    with report.open("wb") as file:
        for first, unit, verdict in corpus:
            lines: list[bytes] = []
            for item, overlap in _judged(unit, verdict, index, matched, config):
                lines = lines or unit.blob("provenance").split(b"\n")
                source = items[overlap.item]
                dropped[source["source"]] += 1
                found.reason[first + item] = CONTAMINATED
                file.write(canonical_json({
                    "document": lines[item].decode(), "evaluation": {k: v for k, v in source.items() if k != "text"},
                    "coverage": round(overlap.coverage, 4), "run": overlap.run,
                    "excerpt": excerpt(source["text"], overlap.first, min(overlap.run, EXCERPT_WORDS))}) + b"\n")
    return {"sets": _by_set(index, items, matched, config, dropped, load_set_aside(folder)),
            "boilerplate": _boilerplate(index, items, counts, config.boilerplate)}


def is_contaminated(overlap: Overlap, coverage: float, run: int) -> bool:
    """Whether an evaluation item is found to a share of `coverage` or in a stretch of `run` words."""
    return overlap.coverage >= coverage or overlap.run >= run


def _judged(unit: Any, verdict: npt.NDArray[np.uint8], index: NgramIndex, matched: npt.NDArray[np.bool_],
            config: DecontaminateConfig) -> list[tuple[int, Overlap]]:
    """(item of the unit, the evaluation item of which one of its texts holds most) of the items to drop."""
    grams = unit["hit_gram"]
    counted = np.flatnonzero((verdict[unit["hit_item"]] == KEPT) & matched[grams])
    _, starts = np.unique(unit["hit_text"][counted], return_index=True)  # hits stand in the order of texts
    worst: dict[int, Overlap] = {}
    for start, stop in pairwise([*starts.tolist(), len(counted)]):
        item = int(unit["hit_item"][counted[start]])
        for overlap in index.judge(grams[counted[start:stop]]):
            known = worst.get(item)
            if is_contaminated(overlap, config.coverage, config.run) and (
                    known is None or (overlap.coverage, overlap.run) > (known.coverage, known.run)):
                worst[item] = overlap
    return sorted(worst.items())


def _by_set(index: NgramIndex, items: list[dict[str, Any]], matched: npt.NDArray[np.bool_],
            config: DecontaminateConfig, dropped: Counter[str],
            set_aside: dict[str, int]) -> dict[str, dict[str, int]]:
    figures = {source.name: {"items": 0, "contaminated": 0, "suspicious": 0, "unreadable": set_aside[source.name],
                             "documents_dropped": dropped[source.name]} for source in config.against}
    for item in items:
        figures[item["source"]]["items"] += 1
    for overlap in index.overlaps(matched):
        kind = "contaminated" if is_contaminated(overlap, config.coverage, config.run) else "suspicious"
        figures[items[overlap.item]["source"]][kind] += 1
    return figures


def _boilerplate(index: NgramIndex, items: list[dict[str, Any]], counts: GramCounts, limit: int) -> dict[str, Any]:
    """The n-grams that stand in too many documents to count, the most frequent ones as text."""
    at = np.flatnonzero(counts.counts > limit)
    order = at[np.lexsort((at, -counts.counts[at].astype(np.int64)))][:BOILERPLATE_EXAMPLES]
    examples = []
    for gram in order.tolist():
        place = int(np.flatnonzero(index.grams == gram)[0])
        item = int(np.searchsorted(index.bounds, place, side="right")) - 1
        examples.append({"documents": int(counts.counts[gram]), "evaluation": items[item]["source"],
                         "text": excerpt(items[item]["text"], place - int(index.bounds[item]), index.n)})
    return {"ngrams": len(at), "examples": examples}
