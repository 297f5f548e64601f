"""BM25: the reference that every trained retriever has to beat."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np

logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets itself to DEBUG and prints

K1, B = 1.2, 0.75
_WORD = re.compile(r"[^\W\d_]+|\d+")
_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str) -> list[str]:
    """Lower-case words and the parts of identifiers: `getHTTPResponse_v2` gives get, http, response, v, 2."""
    return [part.lower() for word in _WORD.findall(text) for part in _CASE.split(word)]


def bm25_search(queries: Sequence[str], passages: Sequence[str], k: int) -> list[list[int]]:
    """Numbers of the k best passages for each query, best first, equal scores by number: those that share a word with
    it, so perhaps fewer, or none.

    Robertson's weighting as Lucene has it, k1 1.2, b 0.75. Source: Robertson and Zaragoza, The probabilistic relevance
    framework: BM25 and beyond (2009).
    """
    split = [words(text) for text in passages]
    if not any(split):
        return [[] for _ in queries]
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(split, show_progress=False)
    found = []
    for query in queries:
        tokens = [token for token in words(query) if token in index.vocab_dict]
        scores = np.asarray(index.get_scores(tokens)) if tokens else np.zeros(len(passages))
        best = np.argsort(-scores, kind="stable")[:k]
        found.append(best[scores[best] > 0].tolist())
    return found
