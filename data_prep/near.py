"""Near copies: MinHash bands name candidates, the true similarity of their shingles decides, copies of copies count.

Everything that grows with the corpus is on the disk: band hashes are grouped by `Grouper`, shingles of candidates and
the forest of copies are mapped files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.clean_config import NearDedupConfig
from data_prep.corpus import KEPT, NEAR_DUPLICATE, Corpus, Verdicts, disk_array
from data_prep.external import Grouper
from data_prep.minhash import jaccard, shingle_sets
from data_prep.texts import unit_texts
from data_prep.words import I64, U64

MAX_LEADERS = 8
"""Items of a band's group that others are compared with: those that are near none before them. More of them mean that
the band says nothing, as in pages of one template."""
_BLOCK_TEXTS = 256


def drop_near(corpus: Corpus, found: Verdicts, folder: Path, config: NearDedupConfig, memory: int) -> None:
    """Drop every item that a chain of near copies joins to an earlier one; the first of each such family is kept."""
    candidates, groups = _candidates(corpus, folder, config, memory)
    if not len(candidates):
        return
    sets = _Sets(corpus, folder, candidates)
    family = _Forest(disk_array(folder, "forest", np.int64, len(candidates)))
    for members in groups:
        _join(members, sets, family, config.threshold)
    for number in range(len(candidates)):
        root = family.root(number)
        if root != number:
            found.reason[candidates[number]] = NEAR_DUPLICATE
            found.keeper[candidates[number]] = candidates[root]


def _candidates(corpus: Corpus, folder: Path, config: NearDedupConfig,
                memory: int) -> tuple[npt.NDArray[Any], Iterator[I64]]:
    """Positions of all items that share a band with another, ascending, and the groups of numbers among them."""
    marked = disk_array(folder, "marked", np.uint8, len(corpus))
    path = folder / ".groups.records"
    with Grouper(folder, "bands", len(corpus) * config.bands, memory) as grouper, path.open("wb") as file:
        for first, unit, verdict in corpus:
            bands = unit["bands"]
            at = np.flatnonzero((verdict == KEPT) & bands.any(axis=1))
            for band in range(config.bands):
                grouper.add(bands[at, band], band, first + at)
        for records, bounds in grouper.groups():
            marked[records["position"]] = 1
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                file.write(np.append(end - begin, records["position"][begin:end]).astype("<i8").tobytes())
    total = sum(int(np.count_nonzero(marked[at:at + (1 << 20)])) for at in range(0, len(marked), 1 << 20))
    candidates = disk_array(folder, "candidates", np.int64, total)
    filled = 0
    for start in range(0, len(marked), 1 << 20):
        at = start + np.flatnonzero(marked[start:start + (1 << 20)])
        candidates[filled:filled + len(at)] = at
        filled += len(at)
    return candidates, _stored_groups(path, candidates)


def _stored_groups(path: Path, candidates: npt.NDArray[Any]) -> Iterator[I64]:
    with path.open("rb") as file:
        path.unlink()
        while head := file.read(8):
            positions = np.frombuffer(file.read(8 * int.from_bytes(head, "little")), "<i8")
            yield np.searchsorted(candidates, positions)


class _Sets:
    """The sorted shingle hashes of every candidate."""

    def __init__(self, corpus: Corpus, folder: Path, candidates: npt.NDArray[Any]) -> None:
        self._ends = disk_array(folder, "set-ends", np.int64, len(candidates) + 1)
        path = folder / ".shingles.array"
        done = 0
        with path.open("wb") as file:
            for number, unit_path in enumerate(corpus.units):
                begin, end = np.searchsorted(candidates, corpus.starts[number:number + 2]).tolist()
                if begin == end:
                    continue
                chosen = np.asarray(candidates[begin:end]) - corpus.starts[number]
                for block, texts in unit_texts(unit_path, chosen, _BLOCK_TEXTS):
                    shingles, bounds = shingle_sets([b"\n".join(parts[:2]).decode() for parts in texts])
                    file.write(shingles.tobytes())
                    at = begin + 1 + block
                    self._ends[at:at + len(texts)] = done + bounds[1:]
                    done += len(shingles)
        self._shingles: npt.NDArray[Any] = np.memmap(path, np.uint64, "r") if done else np.zeros(0, np.uint64)
        path.unlink()

    def __getitem__(self, number: int) -> U64:
        return self._shingles[self._ends[number]:self._ends[number + 1]]

    def near(self, a: int, b: int, threshold: float) -> bool:
        """Whether two candidates are similar enough."""
        sizes = sorted((len(self[a]), len(self[b])))
        return sizes[0] >= threshold * sizes[1] and jaccard(self[a], self[b]) >= threshold


class _Forest:
    """Union-find whose roots are the smallest members. `above` [n] holds parents plus 1, 0 for a root."""

    def __init__(self, above: npt.NDArray[Any]) -> None:
        self._above = above

    def root(self, number: int) -> int:
        """The first member of the family of `number`."""
        path = []
        while above := int(self._above[number]):
            path.append(number)
            number = above - 1
        for passed in path:
            self._above[passed] = number + 1
        return number

    def join(self, a: int, b: int) -> None:
        """Make one family of two."""
        first, second = sorted((self.root(a), self.root(b)))
        if first != second:
            self._above[second] = first + 1


def _join(members: I64, sets: _Sets, family: _Forest, threshold: float) -> None:
    """Join the members of a band's group, ascending, to those before them that they are near copies of."""
    leaders: list[int] = []
    for member in members.tolist():
        near = next((leader for leader in leaders if family.root(leader) == family.root(member)
                     or sets.near(leader, member, threshold)), None)
        if near is not None:
            family.join(near, member)
        elif len(leaders) < MAX_LEADERS:
            leaders.append(member)
