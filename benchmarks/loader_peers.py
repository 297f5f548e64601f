"""The loader beside stock webdataset, litdata, mosaicml-streaming and a flat memory map, windows of 513 and 2049.

All read the same tokens in a shuffled order, one epoch in one process, and give input_ids and labels as int64 batches
of 64. Ours shuffles globally and gives document ids and labels masked at the edges of documents on top; webdataset
shuffles 1,000 samples, litdata and mosaicml-streaming chunks and what is in them. The flat memory map is read in two
ways: as it is usually done (a tensor a row, stacked) and as fast as numpy goes (rows copied into one array), both in a
global random order.

Each pair is of one order and the next in the other; CPU time and wall time are of the same epochs. Files are in the
page cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Comparison, Summary, write_results
from benchmarks.loader import BATCH, read_ours, read_stock, write_samples, write_shards
from benchmarks.peer_worker import measured
from benchmarks.peers import Peer, make_environment
from pretrain.data.shards import ShardSource

TOKENS, PAIRS = 16 * 2**20, 8
GOALS = {"webdataset": 10.0, "litdata": 1.5, "mosaicml-streaming": 20.0, "memory map, usual": 0.7,
         "memory map, fastest": 0.7}
NEEDED = ["lightning-utilities", "filelock", "boto3", "requests", "tifffile", "obstore", "zstd", "python-snappy",
          "Brotli", "xxhash", "catalogue", "tqdm"]
"""What the peers import for tokens on a local disk; torchvision and clients of object stores are left out."""


def read_flat(path: Path, seq_len: int, *, fastest: bool) -> int:
    """One epoch of a file of tokens that is mapped, in a random order."""
    tokens = np.memmap(path, "<u2", "r")
    n = (len(tokens) - 1) // seq_len
    order = np.random.default_rng(0).permutation(n) * seq_len
    plain = np.asarray(tokens)  # slices of a memmap are slow objects of their own
    found = 0
    for at in range(0, n // BATCH * BATCH, BATCH):
        chosen = order[at:at + BATCH].tolist()
        if fastest:
            rows = np.empty((BATCH, seq_len + 1), "<u2")
            for row, start in enumerate(chosen):
                rows[row] = plain[start:start + seq_len + 1]
            input_ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
            labels = torch.from_numpy(rows[:, 1:].astype(np.int64))
        else:
            input_ids = torch.stack([torch.from_numpy(tokens[i:i + seq_len].astype(np.int64)) for i in chosen])
            labels = torch.stack([torch.from_numpy(tokens[i + 1:i + 1 + seq_len].astype(np.int64)) for i in chosen])
        found += len(input_ids) and len(labels)
    return found


def against(ours: Callable[[], dict[str, Any]], other: Callable[[], dict[str, Any]]) -> dict[str, Comparison]:
    """Windows a CPU-second and a second, ours over theirs, by pairs whose order alternates, after one to warm up."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(PAIRS + 1):
        if number % 2:
            theirs, mine = other(), ours()
        else:
            mine, theirs = ours(), other()
        if number:
            pairs.append((mine, theirs))
    found = {}
    for clock, unit in (("cpu", "windows/CPU-s"), ("wall", "windows/s")):
        a, b = ([side["found"] / side[clock] for side in sides] for sides in zip(*pairs, strict=True))
        found[clock] = Comparison(Summary.of(a, unit), Summary.of(b, unit),
                                  Summary.of([x / y for x, y in zip(a, b, strict=True)], "x"))
    return found


def at_length(root: Path, peer: Peer, seq_len: int) -> dict[str, dict[str, Comparison]]:
    """All comparisons at one length."""
    windows = TOKENS // seq_len
    source = ShardSource(write_shards(root / "shards", windows * seq_len + 1), "train", seq_len=seq_len)
    samples, flat = root / "samples.tar", root / "flat.bin"
    write_samples(samples, source)
    opened = [np.asarray(source._opened(shard).reader.tokens(block)) for shard in range(source.split.n_shards)
              for block in range(len(source._opened(shard).rows))]
    np.concatenate(opened).tofile(flat)
    peer.ask("write_litdata", tokens=str(flat), window=seq_len + 1, out=str(root / "litdata"))
    peer.ask("write_mosaicml", tokens=str(flat), window=seq_len + 1, out=str(root / "mosaicml"))
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "webdataset": lambda: measured(partial(read_stock, samples)),
        "litdata": lambda: peer.ask("epoch", kind="litdata", folder=str(root / "litdata"), window=seq_len + 1,
                                    batch=BATCH),
        "mosaicml-streaming": lambda: peer.ask("epoch", kind="mosaicml", folder=str(root / "mosaicml"),
                                               window=seq_len + 1, batch=BATCH),
        "memory map, usual": lambda: measured(partial(read_flat, flat, seq_len, fastest=False)),
        "memory map, fastest": lambda: measured(partial(read_flat, flat, seq_len, fastest=True))}
    found = {}
    for name, other in others.items():
        found[name] = against(lambda: measured(partial(read_ours, source)), other)
        for clock, each in found[name].items():
            print(f"windows of {seq_len + 1}, {name}, {clock}: {each.ratio}; goal {GOALS[name]:g} or more: "
                  f"{'met' if each.ratio.median >= GOALS[name] else 'MISSED'} ({each.ours}; {each.other})", flush=True)
    return found


def main() -> None:
    """Make the environment and measure; about five minutes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        python = make_environment(root / "environment", NEEDED, alone=["litdata", "mosaicml-streaming"])
        results = {}
        with Peer(python) as peer:
            for seq_len in (512, 2048):
                (root / str(seq_len)).mkdir()
                results[f"windows of {seq_len + 1}"] = at_length(root / str(seq_len), peer, seq_len)
            known = peer.ask("versions", names=["litdata", "mosaicml-streaming"])
    write_results("loader_peers", {"peers": known, "goals": GOALS, **results})


if __name__ == "__main__":
    main()
