"""Second stage: what of all that was read is kept.

Exact copies go first, then what would stand in two splits, then what holds text of evaluation sets, then near copies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.config import TRAIN, PrepConfig
from data_prep.copies import drop_elsewhere, drop_exact
from data_prep.corpus import (
    DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    VERDICTS,
    Corpus,
    Verdicts,
    disk_array,
    unit_starts,
)
from data_prep.decontaminate import drop_contaminated
from data_prep.files import write_atomic
from data_prep.near import drop_near
from data_prep.tally import EXAMPLES, Tally
from data_prep.tokenizer_training import sample_limit
from data_prep.unit import Unit
from pretrain.errors import UserError

DECISIONS = "decisions.json"
CONTAMINATION = "contamination.jsonl"
LARGEST_FAMILIES = 5
_MEMORY_SHARE = 4
"""Sorting takes this part of the memory; the rest is for the interpreter, buffers and the page cache."""


def decide(config: PrepConfig, units: list[Path], folder: Path, index: Path | None, report: Path,
           stage: Callable[[str], None]) -> dict[str, Any]:
    """Decide about every item of `units`, or say what was decided before.

    Verdicts are kept in `folder`; `index` holds the n-grams of the evaluation sets, `report` gets what was dropped for
    them; `stage` is told of each step. Returns plain values: `tally`, `changes`, `copies`, `decontamination` and
    `sample_limit`.

    Raises:
        DataCorruption: too much of a source cannot be read.
        UserError: nothing is left for the train split.
    """
    path = folder / DECISIONS
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    tally, changes = _read_tally(config, units)
    corpus = open_corpus(config, units, folder)
    memory = config.memory_bytes // _MEMORY_SHARE
    if config.dedup.exact:
        stage("exact copies")
        _run(corpus, "exact", lambda verdicts: drop_exact(corpus, verdicts, folder, memory))
    if config.kind == "pairs":
        stage("splits")
        _run(corpus, "splits", lambda verdicts: drop_elsewhere(corpus, verdicts, folder, memory))
    if index is not None:
        stage("evaluation sets")
        _decontaminate(corpus, config, folder, index, report)
    near = config.dedup.near
    if near is not None:
        stage("near copies")
        _run(corpus, "near", lambda verdicts: drop_near(corpus, verdicts, folder, near, memory))
    copies = _count(config, corpus, tally, folder)
    _require_train(config, corpus, tally)
    decided = {"tally": tally.state(), "changes": changes, "copies": copies,
               "decontamination": None if index is None else json.loads((folder / "contaminated.json").read_bytes()),
               "sample_limit": sample_limit(corpus, config.split_names.index(TRAIN), config.tokenizer.sample_bytes)}
    write_atomic(path, json.dumps(decided).encode())
    return decided


def open_corpus(config: PrepConfig, units: list[Path], folder: Path) -> Corpus:
    """The items of `units` with the verdicts of the steps that are finished."""
    corpus = Corpus(units, folder, unit_starts(units, folder / "starts.npy"))
    asked = {"exact": config.dedup.exact, "splits": config.kind == "pairs",
             "contaminated": config.decontaminate is not None, "near": config.dedup.near is not None}
    for name, wanted in asked.items():
        if wanted:
            corpus.take_over(name)
    return corpus


def _run(corpus: Corpus, name: str, work: Callable[[Verdicts], None]) -> None:
    """Do a step unless it is finished."""
    if not corpus.knows(name):
        with corpus.step(name) as verdicts:
            work(verdicts)


def _decontaminate(corpus: Corpus, config: PrepConfig, folder: Path, index: Path, report: Path) -> None:
    section = config.decontaminate
    assert section is not None  # there is an index

    def work(verdicts: Verdicts) -> None:
        figures = drop_contaminated(corpus, verdicts, section, index, report, pairs=config.kind == "pairs")
        write_atomic(folder / "contaminated.json", json.dumps(figures).encode())
    _run(corpus, "contaminated", work)


def _read_tally(config: PrepConfig, units: list[Path]) -> tuple[Tally, dict[str, dict[str, int]]]:
    """What reading and cleaning dropped, and by source what cleaning changed."""
    tally = Tally()
    found: Counter[str] = Counter()
    changes: dict[str, Counter[str]] = {}
    for path in units:
        unit = Unit(path)
        name = config.sources[unit.meta["source"]].name
        tally.merge(unit.meta["tally"])
        found[name] += len(unit["size"])
        changes.setdefault(name, Counter()).update(unit.meta["changes"])
    for source, outcomes in tally.counts.items():
        found[source] += sum(entry["documents"] for entry in outcomes.values()) - sum(
            tally.bad.get(source, {}).values())
    tally.require_readable(found, config.max_bad_fraction)
    return tally, {name: {what: count for what, count in sorted(counts.items()) if count}
                   for name, counts in changes.items() if counts.total()}


def _count(config: PrepConfig, corpus: Corpus, tally: Tally, folder: Path) -> dict[str, Any]:
    """Add the verdicts to the tally. Returns what copies there are of what."""
    unit_sources = np.array([Unit(path).meta["source"] for path in corpus.units], np.int64)
    names = [source.name for source in config.sources]
    copies = disk_array(folder, "copies", np.uint32, len(corpus))
    between: Counter[tuple[str, str, str]] = Counter()
    for number, (_, unit, verdict) in enumerate(corpus):
        name = names[unit.meta["source"]]
        for reason in np.unique(verdict).tolist():
            at = np.flatnonzero(verdict == reason)
            tally.add(name, VERDICTS[reason], int(unit["size"][at].sum()), len(at))
            _examples(corpus, tally, name, reason, number, at)
        keepers = corpus.keepers(number)
        for reason in (DUPLICATE, NEAR_DUPLICATE):
            kept = keepers[verdict == reason]
            np.add.at(copies, kept, 1)
            homes = unit_sources[np.searchsorted(corpus.starts, kept, side="right") - 1]
            for home, count in enumerate(np.bincount(homes, minlength=0).tolist()):
                between[VERDICTS[reason], name, names[home]] += count
    return {"between": [{"kind": kind, "source": source, "copies_of": home, "documents": count}
                        for (kind, source, home), count in sorted(between.items()) if count],
            "largest": _largest(corpus, copies)}


def _examples(corpus: Corpus, tally: Tally, name: str, reason: int, number: int, at: npt.NDArray[np.int64]) -> None:
    """Remember the first items of a verdict, with what is kept in their place."""
    known = tally.examples.get(name, {}).get(VERDICTS[reason], [])
    if reason == KEPT or len(known) >= EXAMPLES:
        return
    keepers = corpus.keepers(number)
    for item in at[:EXAMPLES].tolist():
        where = json.loads(corpus.provenance(int(corpus.starts[number]) + item))
        instead = "" if keepers[item] < 0 else "kept: " + corpus.provenance(int(keepers[item])).decode()
        tally.example(name, VERDICTS[reason], where, instead)


def _largest(corpus: Corpus, copies: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """What has most copies, by number of copies and then by position."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(copies), 1 << 20):
        block = np.asarray(copies[start:start + (1 << 20)]).astype(np.int64)
        order = np.lexsort((np.arange(len(block)), -block))[:LARGEST_FAMILIES]
        found += [(-int(block[i]), start + int(i)) for i in order if block[i]]
    return [{"copies": -count, "kept": json.loads(corpus.provenance(position))}
            for count, position in sorted(found)[:LARGEST_FAMILIES]]


def _require_train(config: PrepConfig, corpus: Corpus, tally: Tally) -> None:
    train = config.split_names.index(TRAIN)
    if not any(((verdict == KEPT) & (unit["split"] == train)).any() for _, unit, verdict in corpus):
        found = ", ".join(f"{source}: {reason} {count['documents']}" for source, reasons in tally.counts.items()
                          for reason, count in reasons.items())
        raise UserError(f"the sources hold no document for split {TRAIN} (found {found or 'nothing'})")
