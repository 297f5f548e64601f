"""Packing plans: whole documents side by side in samples of fixed length, so that none is cut without need.

A document of n tokens gives n - 1 places (an input and the token after it); it is cut only where that is more than a
sample holds. Pieces are put into samples by best fit, longest first (Johnson 1973): within a few samples of the least
possible number for usual lengths. A plan is a file beside the shards, made once, hashed, and bound to its dataset:

    SPLIT.pack-LENGTH.plan   `HEADER`, then [samples + 1] u64 first piece of each sample, [pieces] `PIECE`
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import write_atomic
from data_prep.manifest import Manifest, Split
from data_prep.shards import CONTINUES, DOC_FLAGS, DOC_START, ShardReader
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.publish import fsync

HEADER = np.dtype([("magic", "S8"), ("seq_len", "<u8"), ("samples", "<u8"), ("pieces", "<u8"), ("places", "<u8"),
                   ("dataset", "u1", (32,)), ("sha256", "u1", (32,))])
"""`places` are those filled in all samples; the hash is over what follows the header."""
PIECE = np.dtype([("first_token", "<u8"), ("places", "<u4")])
MAGIC = b"packpln1"
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """An opened plan."""

    seq_len: int
    starts: npt.NDArray[np.uint64]
    """[samples + 1] first piece of each sample."""
    pieces: npt.NDArray[Any]
    """[pieces] `PIECE`, sample after sample, in each by position."""
    places: int
    """Filled places of all samples."""
    sha256: str

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.starts) - 1

    @property
    def padding(self) -> float:
        """Share of the places of all samples that stay empty."""
        return 1 - self.places / max(1, self.samples * self.seq_len)


def plan_path(folder: Path, split: str, seq_len: int) -> Path:
    """Where the plan of a split for samples of a length is kept."""
    return folder / f"{split}.pack-{seq_len}.plan"


def make_plan(manifest: Manifest, split_name: str, seq_len: int) -> PackingPlan:
    """Pack a split of documents and keep the plan beside its shards. Memory: about 60 bytes a document.

    Raises:
        UserError: a dataset of pairs, no such split, or one without a document of two tokens.
        DataCorruption: shards that cannot be read.
    """
    manifest.require("documents")
    split = manifest.split(split_name)
    first, places = _pieces(*_documents(split), seq_len)
    if not len(first):
        raise UserError(f'{manifest.folder}: split "{split_name}" has no document of two tokens to pack')
    samples = best_fit(places, seq_len)
    order = np.lexsort((first, samples))
    pieces = np.zeros(len(first), PIECE)
    pieces["first_token"], pieces["places"] = first[order], places[order]
    starts = np.searchsorted(samples[order], np.arange(int(samples.max()) + 2)).astype("<u8")
    body = starts.tobytes() + pieces.tobytes()
    header = np.zeros((), HEADER)
    header["magic"], header["seq_len"], header["samples"] = MAGIC, seq_len, len(starts) - 1
    header["pieces"], header["places"] = len(pieces), int(places.sum())
    header["dataset"] = np.frombuffer(bytes.fromhex(manifest.fingerprint), "u1")
    header["sha256"] = np.frombuffer(hashlib.sha256(body).digest(), "u1")
    write_atomic(plan_path(manifest.folder, split_name, seq_len), header.tobytes() + body)
    fsync(manifest.folder)
    return load_plan(manifest, split_name, seq_len)


def load_plan(manifest: Manifest, split: str, seq_len: int) -> PackingPlan:
    """Open a plan and hold it to its hash.

    Raises:
        UserError: there is none for this length, or it is one of another dataset.
        DataCorruption: it is damaged.
    """
    path = plan_path(manifest.folder, split, seq_len)
    make = f"`pretrain data pack {manifest.folder} --split {split} --seq-len {seq_len}` makes one"
    try:
        content = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"{path}: no packing plan for this length; {make}") from None
    except (OSError, ValueError) as error:
        raise DataCorruption(f"{path}: cannot be read ({error}); {make}") from None
    if len(content) < HEADER.itemsize or content[:8].tobytes() != MAGIC:
        raise DataCorruption(f"{path}: no packing plan; {make}")
    header = np.frombuffer(content, HEADER, 1)[0]
    if header["dataset"].tobytes().hex() != manifest.fingerprint or int(header["seq_len"]) != seq_len:
        raise UserError(f"{path}: a plan for another dataset or length; {make} anew")
    body, samples = content[HEADER.itemsize:], int(header["samples"])
    cut = 8 * (samples + 1)
    whole = len(body) == cut + int(header["pieces"]) * PIECE.itemsize
    if not whole or hashlib.sha256(body.data).digest() != header["sha256"].tobytes():
        raise DataCorruption(f"{path}: does not have the bytes that were written; remove it, and {make}")
    return PackingPlan(seq_len, np.frombuffer(body[:cut], "<u8"), np.frombuffer(body[cut:], PIECE),
                       int(header["places"]), header["sha256"].tobytes().hex())


def _documents(split: Split) -> tuple[I64, I64]:
    """[d] position of the first token of each document in the split, and its tokens."""
    starts = []
    for shard in range(split.n_shards):
        reader = ShardReader(split.tar_path(shard))
        position = int(split.table[shard]["first_token"])
        for block in range(reader.n_blocks):
            rows = reader.docs(block)
            starts.append(position + rows[rows[:, DOC_FLAGS] & CONTINUES == 0, DOC_START])
            position += int(reader.rows[block]["tokens"])
    first = np.concatenate([np.zeros(0, np.int64), *starts])
    return first, np.diff(first, append=split.tokens)


def _pieces(first: I64, tokens: I64, seq_len: int) -> tuple[I64, I64]:
    """First token and places of each piece: documents cut where they have more places than a sample."""
    places = tokens - 1
    counts = -(-places // seq_len)
    owner = np.repeat(np.arange(len(first)), counts)
    before = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return first[owner] + before, np.minimum(seq_len, places[owner] - before)


def best_fit(sizes: I64, capacity: int) -> I64:
    """[n] bin of each item (1 to `capacity`), longest first into the fullest bin that has room.

    Bins are numbered by the first of their items. All items of one size are placed together, so that the work goes
    with the number of different sizes and not of items.
    """
    bins = np.full(len(sizes), -1, np.int64)
    order = np.argsort(-sizes, kind="stable")
    open_bins: dict[int, list[I64]] = defaultdict(list)
    made = at = 0
    for size, count in zip(*(a[::-1].tolist() for a in np.unique(sizes, return_counts=True)), strict=True):
        items, at = order[at:at + count], at + count
        for room in sorted(r for r in open_bins if r >= size):
            if not len(items):
                break
            waiting = np.concatenate(open_bins.pop(room))
            items = _place(items, waiting, size, room, bins, open_bins)
        if len(items):
            fresh = np.arange(made, made + -(-len(items) // (capacity // size)))
            made += len(fresh)
            _place(items, fresh, size, capacity, bins, open_bins)
    firsts = np.full(made, len(sizes), np.int64)
    np.minimum.at(firsts, bins, np.arange(len(sizes)))
    renumbered = np.empty(made, np.int64)
    renumbered[np.argsort(firsts)] = np.arange(made)
    return renumbered[bins]


def _place(items: I64, waiting: I64, size: int, room: int, bins: I64, open_bins: dict[int, list[I64]]) -> I64:
    """Put items of one size into bins with the same room, each bin as full as it gets. Returns the items left."""
    each = room // size
    used = min(len(waiting), -(-len(items) // each))
    placed = min(len(items), used * each)
    bins[items[:placed]] = np.repeat(waiting[:used], each)[:placed]
    filled = np.full(used, each, np.int64)
    filled[-1] -= used * each - placed
    for count in np.unique(filled).tolist():
        left = room - count * size
        if left:
            open_bins[left].append(waiting[:used][filled == count])
    if used < len(waiting):
        open_bins[room].append(waiting[used:])
    return items[placed:]
