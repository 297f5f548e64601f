"""To which split a document belongs: a function of its own text and the seed."""

from __future__ import annotations

import hashlib

from data_prep.config import TRAIN

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def digest_of(text: bytes) -> bytes:
    """16-byte hash of a document, blind to a byte order mark, CRLF and outer white space."""
    normalised = text.removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n").strip()
    return hashlib.blake2b(normalised, digest_size=16).digest()


def keyed_hash(digest: bytes, seed: int, purpose: str) -> int:
    """Uniform in [0, 2^64), independent for each purpose (at most 16 characters)."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key, person=purpose.encode()).digest(), "little")


class Splitter:
    """Assigns a document to a split by its hash: the same one whatever else the corpus holds.

    Splits take consecutive parts of [0, 1) in the order they are given, train takes the rest: adding a split after the
    others moves documents out of train only.
    """

    def __init__(self, shares: dict[str, float], seed: int) -> None:
        self.seed = seed
        self.bounds: list[tuple[int, str]] = []
        upper = 0.0
        for name, share in shares.items():
            upper += share
            self.bounds.append((int(upper * 2**64), name))

    def split_of(self, digest: bytes) -> str:
        """Name of the split."""
        place = keyed_hash(digest, self.seed, "split")
        return next((name for bound, name in self.bounds if place < bound), TRAIN)

    @property
    def rule(self) -> str:
        """The rule in words and numbers, for the manifest."""
        parts = "; ".join(f"{name} below {bound}" for bound, name in self.bounds)
        return (f"blake2b-64(blake2b-128(text without byte order mark, CRLF as LF, stripped), key=seed {self.seed}, "
                f"person=split), little-endian: {parts + '; ' if parts else ''}{TRAIN} otherwise")
