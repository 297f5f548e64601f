"""Bounds on what natural text looks like: Gopher's rules (Rae et al. 2021, appendix A.1.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_prep.clean_config import QualityConfig
from data_prep.words import mix

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "*", "-")
Problem = tuple[str, str]


def quality_problem(text: str, config: QualityConfig) -> Problem | None:
    """(name of the first bound that a document breaks, its figure and the bound), or None."""
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return (_words(words, config) or _symbols(text, words, lines, config) or _repetition(text, lines, config)
            or _ngrams(words, config))


def _over(name: str, value: float, bound: float | None) -> Problem | None:
    return None if bound is None or value <= bound else (name, f"{value:.4g}, at most {bound:g}")


def _under(name: str, value: float, bound: float | None) -> Problem | None:
    return None if bound is None or value >= bound else (name, f"{value:.4g}, at least {bound:g}")


def _words(words: list[str], config: QualityConfig) -> Problem | None:
    count = max(1, len(words))
    mean = sum(map(len, words)) / count
    alphabetic = sum(word[0].isalpha() or any(map(str.isalpha, word)) for word in words) / count
    stop_words = len(STOP_WORDS.intersection(map(str.lower, words)))
    return (_under("min_words", len(words), config.min_words) or _over("max_words", len(words), config.max_words)
            or _under("min_mean_word_length", mean, config.min_mean_word_length)
            or _over("max_mean_word_length", mean, config.max_mean_word_length)
            or _under("min_alphabetic_words", alphabetic, config.min_alphabetic_words)
            or _under("min_stop_words", stop_words, config.min_stop_words))


def _symbols(text: str, words: list[str], lines: list[str], config: QualityConfig) -> Problem | None:
    symbols = text.count("#") + text.count("...") + text.count("…")
    total = max(1, len(lines))
    return (_over("max_symbol_ratio", symbols / max(1, len(words)), config.max_symbol_ratio)
            or _over("max_bullet_lines", sum(line.startswith(_BULLETS) for line in lines) / total,
                     config.max_bullet_lines)
            or _over("max_ellipsis_lines", sum(line.endswith(("...", "…")) for line in lines) / total,
                     config.max_ellipsis_lines))


def _repetition(text: str, lines: list[str], config: QualityConfig) -> Problem | None:
    paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part]
    for noun, parts, most, most_characters in (
            ("lines", lines, config.max_repeated_lines, config.max_repeated_line_characters),
            ("paragraphs", paragraphs, config.max_repeated_paragraphs, config.max_repeated_paragraph_characters)):
        if most is None and most_characters is None:
            continue
        count, characters = _repeated(parts)
        problem = (_over(f"max_repeated_{noun}", count / max(1, len(parts)), most)
                   or _over(f"max_repeated_{noun[:-1]}_characters",
                            characters / max(1, sum(map(len, parts))), most_characters))
        if problem:
            return problem
    return None


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """(parts that stand earlier already, characters in them)."""
    counts = Counter(parts)
    return (sum(n - 1 for n in counts.values()), sum((n - 1) * len(part) for part, n in counts.items() if n > 1))


def _ngrams(words: list[str], config: QualityConfig) -> Problem | None:
    """Shares of characters in n-grams that repeat. Words are numbered, so that an n-gram is one integer."""
    top, repeated = config.max_top_ngram or {}, config.max_repeated_ngrams or {}
    if not words or not (top or repeated):
        return None
    numbers: dict[str, int] = {}
    ids = mix(np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.uint64, len(words)))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for n in sorted({*top, *repeated}):
        if len(words) < n:
            break
        grams = ids[:len(ids) - n + 1].copy()
        for k in range(1, n):
            grams = grams * np.uint64(0x9E3779B97F4A7C15) + ids[k:len(ids) - n + 1 + k]
        _, first, inverse, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        if len(first) == len(grams):
            return None  # where none of these repeats, no longer one does
        if n in top:
            sizes = counts * (ends[first + n] - ends[first])
            most = int(sizes[counts > 1].max(initial=0))
            problem = _over(f"max_top_{n}gram", most / ends[-1], top[n])
        else:
            marks = np.zeros(len(words) + 1, np.int64)
            at = np.flatnonzero((counts > 1)[inverse] & (first[inverse] != np.arange(len(grams))))
            np.add.at(marks, at, 1)
            np.add.at(marks, at + n, -1)
            problem = _over(f"max_repeated_{n}grams", int(lengths[np.cumsum(marks[:-1]) > 0].sum()) / ends[-1],
                            repeated[n])
        if problem:
            return problem
    return None
