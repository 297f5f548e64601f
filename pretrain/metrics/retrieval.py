"""Retrieval: exact search by inner product, and figures of ranked lists against relevance judgements.

Figures follow trec_eval: DCG with linear gain and log2(rank + 1); the ideal ranking is that of all judged documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Judged = Mapping[int, float]
"""Relevance by document; what is not named, or has 0 or less, is not relevant."""


def exact_search(queries: torch.Tensor, corpus: torch.Tensor, k: int, *, block: int = 16384,
                 query_block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """The k documents with the largest inner product for each query, best first.

    The whole score matrix is never held: blocks of documents are searched and merged. Equal scores go to the document
    of the smaller number, so that the result does not depend on the size of blocks.

    Args:
        queries: [q, d].
        corpus: [n, d], of the same dtype and device; vectors of length 1 make this a search by cosine.
        k: documents a query, cut to n.

    Returns:
        (scores fp32 [q, k], numbers int64 [q, k]).
    """
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"queries [q, d] and corpus [n, d] are needed, found {tuple(queries.shape)} and "
                         f"{tuple(corpus.shape)}")
    k = min(k, len(corpus))
    parts = [_search(chunk, corpus, k, block) for chunk in queries.split(query_block)]
    if not parts:
        empty = torch.empty(0, k, device=queries.device)
        return empty, empty.long()
    return torch.cat([scores for scores, _ in parts]), torch.cat([numbers for _, numbers in parts])


def _search(queries: torch.Tensor, corpus: torch.Tensor, k: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.empty(len(queries), 0, device=queries.device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(corpus), block):
        scores = (queries @ corpus[start:start + block].T).float()
        found = torch.arange(start, start + scores.shape[1], device=queries.device).expand(len(queries), -1)
        # What was found before stands first and has smaller numbers: among equals the first place wins.
        scores, found = torch.cat([best, scores], 1), torch.cat([numbers, found], 1)
        order = _first_among_equals(scores, min(k, scores.shape[1]))
        best, numbers = scores.gather(1, order), found.gather(1, order)
    return best, numbers


def _first_among_equals(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Places [q, k] of the k largest of each row [q, n], in order; of equal ones the first.

    Equal to `scores.sort(descending=True, stable=True).indices[:, :k]`, which sorts whole rows.
    """
    top = scores.topk(k, dim=1)
    places = top.indices.sort(dim=1).values
    places = places.gather(1, scores.gather(1, places).sort(dim=1, descending=True, stable=True).indices)
    cut = (scores >= top.values[:, -1:]).sum(1) > k  # some that equal the last one were left out, perhaps the first
    if bool(cut.any()):
        places[cut] = scores[cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return places


def ndcg(ranked: Sequence[Sequence[int]], judged: Sequence[Judged], k: int) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of the first k, per query; 0 for a query without relevant documents.

    Source: Jarvelin and Kekalainen, Cumulated gain-based evaluation of IR techniques (2002), as in trec_eval.
    """
    found = np.zeros(len(ranked))
    for query, (documents, relevance) in enumerate(_paired(ranked, judged)):
        ideal = sorted((gain for gain in relevance.values() if gain > 0), reverse=True)[:k]
        gains = [max(0.0, relevance.get(document, 0.0)) for document in documents[:k]]
        found[query] = _dcg(gains) / _dcg(ideal) if ideal else 0.0
    return found


def _dcg(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(rank + 2) for rank, gain in enumerate(gains)))


def reciprocal_rank(ranked: Sequence[Sequence[int]], judged: Sequence[Judged], k: int) -> NDArray[np.float64]:
    """1 / rank of the first relevant document among the first k, per query; 0 where there is none."""
    found = np.zeros(len(ranked))
    for query, (documents, relevance) in enumerate(_paired(ranked, judged)):
        hits = (rank for rank, document in enumerate(documents[:k], 1) if relevance.get(document, 0.0) > 0)
        found[query] = 1.0 / rank if (rank := next(hits, 0)) else 0.0
    return found


def recall(ranked: Sequence[Sequence[int]], judged: Sequence[Judged], k: int) -> NDArray[np.float64]:
    """Share of a query's relevant documents among the first k, per query; 0 for a query without relevant documents."""
    found = np.zeros(len(ranked))
    for query, (documents, relevance) in enumerate(_paired(ranked, judged)):
        relevant = {document for document, gain in relevance.items() if gain > 0}
        found[query] = len(relevant.intersection(documents[:k])) / len(relevant) if relevant else 0.0
    return found


def _paired(ranked: Sequence[Sequence[int]], judged: Sequence[Judged]) -> zip[tuple[Sequence[int], Judged]]:
    if len(ranked) != len(judged):
        raise ValueError(f"{len(ranked)} rankings and judgements of {len(judged)} queries")
    return zip(ranked, judged, strict=True)
