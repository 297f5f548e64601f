"""The sidecar of a shard: where each block's payloads lie inside the tar, so that nobody parses it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataCorruption

INDEX_HEADER = np.dtype([("magic", "S8"), ("blocks", "<u8"), ("token_bytes", "<u8"), ("tar_bytes", "<u8"),
                         ("tar_sha256", "u1", (32,)), ("rows_sha256", "u1", (32,)), ("reserved", "u1", (32,))])
"""128 bytes; the two hashes tie the rows to each other and to the tar they were written with."""
INDEX_ROW = np.dtype([("tokens_offset", "<u8"), ("tokens", "<u8"), ("docs_offset", "<u8"), ("docs", "<u8"),
                      ("prov_offset", "<u8"), ("prov_bytes", "<u8")])
"""Byte offsets from the start of the tar (past tar and npy headers); `tokens` and `docs` count items and rows."""
PAIR_ROW = np.dtype([(name, "<u8") for name in (
    "pairs", "negatives",
    *(f"{side}_{what}" for side in "qpn" for what in ("tokens", "tokens_offset", "starts_offset")), "ids_offset",
    "n_ids_offset", "n_offsets_offset", "scores_offset", "prov_offset", "prov_bytes")])
"""The same for a block of pairs: `pairs`, `negatives` and `SIDE_tokens` count items, `SIDE_starts` are its offsets."""


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """What the sidecars of a kind of dataset look like."""

    magic: bytes
    row: np.dtype[Any]
    items: str
    """Column that counts what addresses are made of: tokens or pairs."""


DOCUMENTS = IndexLayout(b"shardix1", INDEX_ROW, "tokens")
PAIRS = IndexLayout(b"pairidx1", PAIR_ROW, "pairs")
LAYOUTS = {"documents": DOCUMENTS, "pairs": PAIRS}


def index_path(tar_path: Path) -> Path:
    """The sidecar of a shard."""
    return tar_path.with_suffix(".idx")


def index_bytes(blocks: int, layout: IndexLayout = DOCUMENTS) -> int:
    """Size of the sidecar of a shard of `blocks` blocks."""
    return INDEX_HEADER.itemsize + blocks * layout.row.itemsize


def read_index(path: Path, layout: IndexLayout = DOCUMENTS) -> tuple[Any, npt.NDArray[Any]]:
    """Header and rows of a sidecar, checked against their hash. Raises DataCorruption."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataCorruption(f"{path}: index cannot be read ({error.strerror})") from None
    if len(content) < INDEX_HEADER.itemsize or not content.startswith(layout.magic):
        raise DataCorruption(f"{path}: no shard index (it begins with {content[:8]!r}, {layout.magic!r} is right)")
    header = np.frombuffer(content, INDEX_HEADER, 1)[0]
    body = content[INDEX_HEADER.itemsize:]
    if len(content) != index_bytes(int(header["blocks"]), layout) or int(header["token_bytes"]) not in (2, 4):
        raise DataCorruption(f"{path}: {len(content)} bytes do not hold the {int(header['blocks'])} blocks it states")
    if hashlib.sha256(body).digest() != header["rows_sha256"].tobytes():
        raise DataCorruption(f"{path}: rows of the index do not have the hash in its header")
    return header, np.frombuffer(body, layout.row)
