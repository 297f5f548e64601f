"""Exact copies, and what would stand in two splits: the first one in the order of the sources is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.corpus import DUPLICATE, KEPT, QUERY_ELSEWHERE, Corpus, Verdicts
from data_prep.external import Grouper
from data_prep.item import HOME_NAMES
from data_prep.words import I64


def drop_exact(corpus: Corpus, found: Verdicts, folder: Path, memory: int) -> None:
    """Drop every item whose digest an earlier one has, wherever that stands."""
    with Grouper(folder, "digests", len(corpus), memory) as grouper:
        for first, unit, verdict in corpus:
            at = np.flatnonzero(verdict == KEPT)
            high, low = _halves(unit["digest"][at])
            grouper.add(high, low, first + at)
        for records, bounds in grouper.groups():
            _drop_all_but_first(records["position"], bounds, found)


def _drop_all_but_first(positions: I64, bounds: I64, found: Verdicts) -> None:
    firsts = np.repeat(positions[bounds[:-1]], np.diff(bounds))
    copies = positions != firsts
    found.reason[positions[copies]] = DUPLICATE
    found.keeper[positions[copies]] = firsts[copies]


def drop_elsewhere(corpus: Corpus, found: Verdicts, folder: Path, memory: int) -> None:
    """Drop pairs whose query, package or mined passage came first in another split: it belongs there."""
    with Grouper(folder, "homes", len(corpus) * len(HOME_NAMES), memory) as grouper:
        for first, unit, verdict in corpus:
            for home in range(len(HOME_NAMES)):
                at = np.flatnonzero((verdict == KEPT) & unit["has_home"][:, home])
                high, low = _halves(unit["homes"][at, home])
                grouper.add(high, low ^ np.uint64(home), first + at, unit["split"][at] * len(HOME_NAMES) + home)
        for records, bounds in grouper.groups():
            split, kind = np.divmod(records["value"], len(HOME_NAMES))
            sizes = np.diff(bounds)
            strangers = split != np.repeat(split[bounds[:-1]], sizes)
            firsts = np.repeat(records["position"][bounds[:-1]], sizes)
            places, reasons = records["position"][strangers], QUERY_ELSEWHERE + kind[strangers]
            # One item may have several reasons, in partitions of any order: the smallest counts.
            known = found.reason[places]
            better = (known == KEPT) | (reasons < known)
            found.keeper[places[better]] = firsts[strangers][better]
            found.reason[places[better]] = reasons[better]


def _halves(digests: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """[n, 16] bytes as two [n] numbers."""
    halves = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]
