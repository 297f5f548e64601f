"""Every fault of a dataset on disk, named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.crew import available_cores
from data_prep.manifest import TOKENIZER, Manifest
from data_prep.shards import verify_shard
from data_prep.tokenizer import TOKEN_BYTES, load_tokenizer, token_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found."""

    faults: list[str]
    """One line each, naming the file; empty for a sound dataset."""
    shards: int
    """Shards hashed."""
    bytes: int
    """Bytes hashed."""


def verify_dataset(folder: Path, sample: float = 1.0, seed: int = 0) -> Report:
    """Look for every fault of a dataset.

    Tokenizer, tables, presence and sizes are always checked. A share `sample` of each split's shards, drawn by `seed`,
    is hashed, on as many threads as there are cores.

    Raises:
        UserError: no dataset in `folder`, or one of another format.
        DataCorruption: a manifest that cannot be read.
    """
    manifest = Manifest.read(folder)
    faults = manifest.problems()
    named = {fault.split(": ", 1)[0] for fault in faults}
    if str(folder / TOKENIZER) not in named and manifest.tokenizer_sha256 is not None:
        faults += _token_bytes_faults(folder)
    todo = []
    rng = np.random.default_rng(seed)
    for name, record in manifest.splits.items():
        if str(folder / record.table) in named:
            continue  # its rows say nothing about the shards
        split = manifest.split(name)
        drawn = rng.permutation(split.n_shards)[:int(np.ceil(sample * split.n_shards))]
        paths = [(split.tar_path(int(i)), split.table[i]) for i in np.sort(drawn)]
        todo += [(path, row, manifest.layout) for path, row in paths if str(path) not in named]
    with ThreadPoolExecutor(available_cores()) as pool:
        faults += [fault for fault in pool.map(lambda shard: verify_shard(*shard), todo) if fault is not None]
    return Report(faults, len(todo), sum(int(row["bytes"]) for _, row, _ in todo))


def _token_bytes_faults(folder: Path) -> list[str]:
    """What is wrong with token_bytes.npy, which follows from the tokenizer."""
    path = folder / TOKEN_BYTES
    expected = token_bytes(load_tokenizer(folder / TOKENIZER))
    if expected is None:
        return []
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return [f"{path}: cannot be read ({error})"]
    if found.dtype != expected.dtype or not np.array_equal(found, expected):
        return [f"{path}: does not follow from {TOKENIZER} (changed bytes or another tokenizer's)"]
    return []
