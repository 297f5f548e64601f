"""Real texts and near copies of them at any similarity, for measuring what deduplication finds."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

Shingles = set[tuple[str, ...]]


def shingles(text: str, n: int = 5) -> Shingles:
    """The word shingles of an English text, the slow and obvious way."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the shingles of two texts."""
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def originals(count: int, seed: int = 2) -> list[str]:
    """Real texts of 100 to 500 words that have little in common: the interpreter's own sources, a stretch of each."""
    draw = random.Random(seed)
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and p.stat().st_size > 8000)
    texts: list[str] = []
    seen: Shingles = set()
    for path in paths:
        words = path.read_text(errors="replace").split()
        start = 0
        while start + 100 <= len(words) and len(texts) < count:
            size = draw.randint(100, 500)
            text = " ".join(words[start:start + size])
            start += size
            found = shingles(text)
            if len(found & seen) < 0.2 * len(found) and len(found) > 60:
                seen |= found
                texts.append(text)
    return texts


def edited(text: str, target: float, draw: random.Random) -> tuple[str, float]:
    """Words changed, dropped and added one by one until the similarity falls to about `target`; what it is then."""
    words, found, now = text.split(), shingles(text), 1.0
    while now > target:
        at = draw.randrange(len(words))
        words[at:at + draw.randint(0, 1)] = [f"new{draw.randrange(10**6)}"] * draw.randint(0, 1)
        other = shingles(" ".join(words))
        now = len(found & other) / len(found | other)
    return " ".join(words), now


def planted(count: int, lowest: float = 0.4, highest: float = 0.98, seed: int = 3) -> list[tuple[str, str, float]]:
    """(text, near copy, their similarity), the similarities spread between `lowest` and `highest`."""
    draw = random.Random(seed)
    return [(text, *edited(text, draw.uniform(lowest, highest), draw)) for text in originals(count)]
