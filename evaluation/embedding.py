"""Tasks `sts`, `retrieval` and `collapse`: what the vectors of an encoder are worth, by head and dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.embedding_data import ScoredPairs
from evaluation.vectors import Rows, shorten
from pretrain.engine.evaluator import Metric
from pretrain.errors import UserError
from pretrain.metrics.collapse import alignment, effective_rank, mean_cosine, uniformity
from pretrain.metrics.intervals import bootstrap_mean
from pretrain.metrics.retrieval import exact_search, ndcg, recall, reciprocal_rank
from pretrain.metrics.sts import cosines, pearson, spearman, spearman_interval

STS, RETRIEVAL, COLLAPSE = "sts", "retrieval", "collapse"
VERSIONS = {STS: 1, RETRIEVAL: 3, COLLAPSE: 1}
RECALL_AT = (1, 5, 10, 100)
DEEPEST = max(RECALL_AT) + 1
"""Passages ranked: one of them may be the query itself."""
COLLAPSE_TEXTS = 512

Encode = Callable[[Rows, Sequence[str] | None], dict[str, torch.Tensor]]
"""Rows of ids and names of heads (None: the default one) -> vectors [n, d] by head."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The vectors of a head, or their first coordinates at length 1."""

    head: str | None = None
    """None: the model's default head."""
    dim: int | None = None
    """None: all coordinates."""

    @classmethod
    def parse(cls, text: str) -> Cut:
        """`HEAD`, `HEAD:DIM` or `:DIM`. Raises UserError."""
        head, _, dim = text.partition(":")
        if dim and not dim.isdigit():
            raise UserError(f"{text}: HEAD or HEAD:DIM would be right, with a number of coordinates for DIM")
        return cls(head or None, int(dim) if dim else None)


def cut_vectors(encode: Encode, rows: Rows, cuts: Sequence[Cut]) -> dict[str, torch.Tensor]:
    """Unit vectors [n, d] of rows of ids by `HEAD` or `HEAD:DIM`; each head is computed once. Collective."""
    named = [cut.head for cut in cuts if cut.head is not None]
    default = encode(rows, None) if len(named) < len(cuts) else {}
    given = encode(rows, list(dict.fromkeys(named))) if named else {}
    found = {}
    for cut in cuts:
        head = next(iter(default)) if cut.head is None else cut.head
        vectors = default[head] if cut.head is None else given[head]
        found[head if cut.dim is None else f"{head}:{cut.dim}"] = shorten(vectors, cut.dim)
    return found


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranked passages of every query, with what is right."""

    ranked: list[list[int]]
    relevant: Sequence[Mapping[int, float]]

    def without(self, own: Sequence[int | None] | None) -> Ranking:
        """Each query's `own` passage left out, as BEIR has it: where it is judged, it stays. None: no query has one."""
        if own is None:
            return self
        kept = [row if mine in right else [number for number in row if number != mine]
                for row, mine, right in zip(self.ranked, own, self.relevant, strict=True)]
        return Ranking(kept, self.relevant)

    def metrics(self, prefix: str, seed: int = 0) -> dict[str, Metric]:
        """`PREFIX/ndcg@10`, `mrr@10`, `recall@K`, with bootstrap intervals over queries."""
        values = {"ndcg@10": ndcg(self.ranked, self.relevant, 10),
                  "mrr@10": reciprocal_rank(self.ranked, self.relevant, 10),
                  **{f"recall@{k}": recall(self.ranked, self.relevant, k) for k in RECALL_AT}}
        return {f"{prefix}/{name}": Metric(float(each.mean()), len(each), True,
                                           bootstrap_mean(each, seed=seed) if len(each) > 1 else None)
                for name, each in values.items()}


def sts_metrics(first: torch.Tensor, second: torch.Tensor, scores: Sequence[float], prefix: str, *,
                seed: int = 0) -> dict[str, Metric]:
    """`PREFIX/spearman` (with its interval) and `PREFIX/pearson` of the cosines of two sets of vectors [n, d]."""
    alike = cosines(first.cpu().numpy(), second.cpu().numpy())
    gold = np.asarray(scores)
    return {f"{prefix}/spearman": Metric(spearman(alike, gold), len(gold), True,
                                         spearman_interval(alike, gold, seed=seed)),
            f"{prefix}/pearson": Metric(pearson(alike, gold), len(gold), True)}


def sts(encode: Encode, tokens: Callable[[Sequence[str]], list[list[int]]], pairs: ScoredPairs,
        cuts: Sequence[Cut] = (Cut(),), *, seed: int = 0) -> dict[str, Metric]:
    """Correlation of cosines with the judgement of people: `sts/VECTORS/spearman`, `.../pearson`. Collective."""
    found: dict[str, Metric] = {}
    n = len(pairs.first)
    for name, vectors in cut_vectors(encode, tokens([*pairs.first, *pairs.second]), cuts).items():
        found |= sts_metrics(vectors[:n], vectors[n:], pairs.scores, f"{STS}/{name}", seed=seed)
    return found | retention(found, "spearman")


def retrieval(encode: Encode, queries: Rows, passages: Rows, relevant: Sequence[Mapping[int, float]],
              cuts: Sequence[Cut] = (Cut(),), *, own: Sequence[int | None] | None = None, seed: int = 0
              ) -> dict[str, Metric]:
    """Exact search of `passages` by cosine: `retrieval/VECTORS/ndcg@10` and so on. Collective.

    `own` names the passage of each query that is the query itself; see `Ranking.without`.
    """
    asked, searched = cut_vectors(encode, queries, cuts), cut_vectors(encode, passages, cuts)
    found: dict[str, Metric] = {}
    for name in asked:
        _, numbers = exact_search(asked[name], searched[name], DEEPEST)
        found |= Ranking(numbers.tolist(), relevant).without(own).metrics(f"{RETRIEVAL}/{name}", seed)
    return found | retention(found, "recall@10")


def retention(found: Mapping[str, Metric], figure: str) -> dict[str, Metric]:
    """`TASK/VECTORS/retention` of every shortened vector: its `figure` over that of the longest it is a prefix of.

    Prefixes are `HEAD:DIM` of HEAD, and `NAME_DIM` of the widest `NAME_...`; left out where the whole has no figure
    above 0, or was not evaluated.
    """
    rows = {name.split("/")[1]: (name, metric) for name, metric in found.items() if name.endswith(f"/{figure}")}
    widest: dict[str, tuple[int, str]] = {}
    for vectors in rows:
        stem, width = _stem(vectors)
        if ":" not in vectors:
            widest[stem] = max(widest.get(stem, (0, "")), (width, vectors))
    kept = {}
    for vectors, (name, metric) in rows.items():
        whole = widest.get(_stem(vectors)[0], (0, vectors))[1]
        base = rows[whole][1].value
        if whole != vectors and base > 0:
            kept[f"{name.removesuffix(figure)}retention"] = Metric(metric.value / base, metric.n, True)
    return kept


def _stem(vectors: str) -> tuple[str, int]:
    """`semantic_768:100` -> ("semantic", 768); a head whose name tells no width is its own stem."""
    head = vectors.partition(":")[0]
    stem, _, width = head.rpartition("_")
    return (stem, int(width)) if stem and width.isdigit() else (head, 0)


def collapse(encode: Encode, queries: Rows, passages: Rows, cuts: Sequence[Cut] = (Cut(),)) -> dict[str, Metric]:
    """Whether vectors of different texts differ, over the first `COLLAPSE_TEXTS` pairs of a query and the passage that
    answers it: `collapse/VECTORS/effective_rank` and so on. Collective.
    """
    n = min(len(queries), len(passages), COLLAPSE_TEXTS)
    if n < 2:
        raise UserError(f"collapse is judged on pairs of a query and its passage; two at least, found {n}")
    left, right = cut_vectors(encode, queries[:n], cuts), cut_vectors(encode, passages[:n], cuts)
    found: dict[str, Metric] = {}
    for name, vectors in right.items():
        values = {"effective_rank": (effective_rank(vectors), True), "mean_cosine": (mean_cosine(vectors), False),
                  "alignment": (alignment(left[name], vectors), False), "uniformity": (uniformity(vectors), False)}
        found |= {f"{COLLAPSE}/{name}/{figure}": Metric(value, n, better)
                  for figure, (value, better) in values.items()}
    return found

