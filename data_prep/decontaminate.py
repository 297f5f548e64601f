"""Items that hold text of evaluation sets: which, how much of what, and what is only boilerplate."""

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


def drop_contaminated(corpus: Corpus, found: Verdicts, config: DecontaminateConfig, folder: Path, report: Path, *,
                      pairs: bool) -> dict[str, Any]:
    """Drop every item one of whose texts holds too much of an evaluation item.

    Boilerplate does not count. In `pairs`, whose texts are short, it does where an evaluation item stands whole in a
    text: what many pairs share is a sentence and no licence. `folder` holds the index; `report` gets a JSON line for
    each item that is dropped, in their order. Returns figures by evaluation set: items, how many the corpus covers and
    touches (dropped or not), what was dropped for them.
    """
    index, items = NgramIndex.load(folder), load_items(folder)
    counts = GramCounts(index)
    for _, unit, verdict in corpus:
        alive = verdict[unit["hit_item"]] == KEPT
        counts.add(Hits(unit["hit_item"][alive], unit["hit_text"][alive], unit["hit_gram"][alive]))
    matched = counts.matched(config.boilerplate)
    excused = _excused(index, counts, config.boilerplate) if pairs else {}
    whole: set[int] = set()
    dropped: Counter[str] = Counter()
    with report.open("wb") as file:
        for first, unit, verdict in corpus:
            lines: list[bytes] = []
            worst = _judged(unit, verdict, index, matched, config)
            copies = _whole(unit, verdict, index, excused)
            whole.update(overlap.item for overlap in copies.values())
            for item, overlap in sorted((worst | copies).items()):
                lines = lines or unit.blob("provenance").split(b"\n")
                source = items[overlap.item]
                dropped[source["source"]] += 1
                found.reason[first + item] = CONTAMINATED
                file.write(canonical_json({
                    "document": lines[item].decode(), "evaluation": {k: v for k, v in source.items() if k != "text"},
                    "coverage": round(overlap.coverage, 4), "run": overlap.run,
                    "excerpt": excerpt(source["text"], overlap.first, min(overlap.run, EXCERPT_WORDS))}) + b"\n")
    return {"sets": _by_set(index, items, matched, whole, config, dropped, load_set_aside(folder)),
            "boilerplate": _boilerplate(index, items, counts, config.boilerplate)}


def is_contaminated(overlap: Overlap, coverage: float, run: int) -> bool:
    """Whether an evaluation item is found to a share of `coverage` or in a stretch of `run` words."""
    return overlap.coverage >= coverage or overlap.run >= run


def _judged(unit: Any, verdict: npt.NDArray[np.uint8], index: NgramIndex, matched: npt.NDArray[np.bool_],
            config: DecontaminateConfig) -> dict[int, Overlap]:
    """Item of the unit that is to drop -> the evaluation item of which one of its texts holds most."""
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
    return worst


def _excused(index: NgramIndex, counts: GramCounts, boilerplate: int) -> dict[int, list[int]]:
    """First n-gram -> evaluation items that may stand whole in a text, but hold boilerplate."""
    excused: dict[int, list[int]] = {}
    for item in index.items_of(np.flatnonzero(counts.common(boilerplate))).tolist():
        grams = index.grams_of(item)
        if (counts.counts[grams] > 0).all():
            excused.setdefault(int(grams[0]), []).append(item)
    return excused


def _whole(unit: Any, verdict: npt.NDArray[np.uint8], index: NgramIndex,
           excused: dict[int, list[int]]) -> dict[int, Overlap]:
    """Item of the unit -> one of the excused evaluation items that stand whole in one of its texts."""
    found: dict[int, Overlap] = {}
    if not excused:
        return found
    texts, grams = unit["hit_text"], unit["hit_gram"]
    begins = np.isin(grams, np.fromiter(excused, np.int64))
    for hit in np.flatnonzero((verdict[unit["hit_item"]] == KEPT) & begins).tolist():
        first, stop = np.searchsorted(texts, texts[hit]), np.searchsorted(texts, texts[hit], side="right")
        for item in excused[int(grams[hit])]:
            if np.isin(index.grams_of(item), grams[first:stop]).all():
                found.setdefault(int(unit["hit_item"][hit]), Overlap(item, 1.0, int(index.lengths[item]), 0))
    return found


def _by_set(index: NgramIndex, items: list[dict[str, Any]], matched: npt.NDArray[np.bool_], whole: set[int],
            config: DecontaminateConfig, dropped: Counter[str],
            set_aside: dict[str, int]) -> dict[str, dict[str, int]]:
    figures = {source.name: {"items": 0, "contaminated": 0, "suspicious": 0, "unreadable": set_aside[source.name],
                             "documents_dropped": dropped[source.name]} for source in config.against}
    for item in items:
        figures[item["source"]]["items"] += 1
    bad = {overlap.item: is_contaminated(overlap, config.coverage, config.run) for overlap in index.overlaps(matched)}
    for number, contaminated in (bad | dict.fromkeys(whole, True)).items():
        figures[items[number]["source"]]["contaminated" if contaminated else "suspicious"] += 1
    return figures


def _boilerplate(index: NgramIndex, items: list[dict[str, Any]], counts: GramCounts, limit: int) -> dict[str, Any]:
    """The n-grams that stand in too many documents to count, the most frequent ones as text."""
    at = np.flatnonzero(counts.common(limit))
    order = at[np.lexsort((at, -counts.counts[at].astype(np.int64)))][:BOILERPLATE_EXAMPLES]
    examples = []
    for gram in order.tolist():
        place = int(np.flatnonzero(index.grams == gram)[0])
        item = int(np.searchsorted(index.bounds, place, side="right")) - 1
        examples.append({"documents": int(counts.counts[gram]), "evaluation": items[item]["source"],
                         "text": excerpt(items[item]["text"], place - int(index.bounds[item]), index.n)})
    return {"ngrams": len(at), "examples": examples}
