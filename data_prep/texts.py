"""Texts of the items of a unit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.unit import Unit
from data_prep.words import I64


def unit_texts(path: Path, chosen: I64, block: int) -> Iterator[tuple[int, list[list[bytes]]]]:
    """(number of the first, texts of each) of chosen items of a unit, `block` of them at a time."""
    unit = Unit(path)
    content = unit.blob("texts")
    text_ends = np.concatenate([[0], np.cumsum(unit["text_bytes"])])
    item_ends = np.concatenate([[0], np.cumsum(unit["n_texts"])])
    for at in range(0, len(chosen), block):
        found = []
        for item in chosen[at:at + block].tolist():
            ends = text_ends[item_ends[item]:item_ends[item + 1] + 1].tolist()
            found.append([content[a:b] for a, b in pairwise(ends)])
        yield at, found
