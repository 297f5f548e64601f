"""Figures of the needle task from predictions, and what chance alone would give (AFRB spec, sections 9.2 and 19).

Rates are token-level: N examples of L answer tokens are N * L trials in N clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.metrics.intervals import Interval, binomial_tail, clustered_proportion

I64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of trials with its interval."""

    hits: int
    n: int
    ci: Interval
    """95 %, by cluster bootstrap over examples; exact binomial at 0 and 100 %."""
    examples: int
    examples_hit: int
    """Examples with a hit at all: they are independent, hits within one are not."""

    @property
    def value(self) -> float:
        """hits / n."""
        return self.hits / self.n

    @classmethod
    def of(cls, hits: ArrayLike, *, seed: int = 0) -> Rate:
        """The rate of [N, K] (or [N]) outcomes; a row is a cluster. Raises ValueError where there is none."""
        outcomes = np.asarray(hits, np.bool_)
        rows = outcomes.reshape(len(outcomes), -1)
        sums = rows.sum(axis=1)
        ci = clustered_proportion(sums, np.full(len(rows), rows.shape[1]), seed=seed)
        return cls(int(sums.sum()), rows.size, ci, len(rows), int((sums > 0).sum()))

    def at_uniform_chance(self, probability: float) -> bool:
        """As `at_chance`, where nothing of the answer is within reach: each hit is evidence of its own (spec, 19)."""
        return self.hits < hits_needed(self.n, probability)

    def at_chance(self, probability: float) -> bool:
        """Whether guessing each trial right with `probability` does as well once in a thousand times.

        As well in examples that are hit at all: a model that wanders through its memory may hit many tokens of one, and
        that is still one example. And as well in hits, which chance may spread over every example; as these come in
        clusters, more of them than trials by themselves would give count only with an interval wholly above.
        """
        each = 1 - (1 - probability) ** (self.n / self.examples)
        more_hits = not self.at_uniform_chance(probability) and self.ci[0] > probability
        return self.examples_hit < hits_needed(self.examples, each) and not more_hits


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model answered to N needles of L tokens."""

    needle: I64Array
    """[N, L] the right answer."""
    free: I64Array
    """[N, L] greedy, the model reading its own answers."""
    forced_rank: I64Array | None = None
    """[N, L] how many tokens the model puts before the right one, reading the right answers."""
    echo: BoolArray | None = None
    """[N, L] at the needle's own places in the context: is the first choice the token that stands there."""
    echo_haystack: BoolArray | None = None
    """[N, K] the same at other places."""

    @property
    def hits(self) -> BoolArray:
        """[N, L] free-running answers that are right."""
        return np.equal(self.free, self.needle)

    @property
    def in_bag(self) -> BoolArray:
        """[N, L] free-running answers that are any token of the needle."""
        return (self.free[:, :, None] == self.needle[:, None, :]).any(axis=2)


def needle_rates(found: Predictions, top_k: int, *, seed: int = 0) -> dict[str, Rate]:
    """All rates of spec section 9.2, those whose predictions are there."""
    hits = found.hits
    length = hits.shape[1]
    rates = {"needle_hit_rate": Rate.of(hits, seed=seed),
             "needle_exact_match": Rate.of(hits.all(axis=1), seed=seed),
             "needle_partial_success_rate": Rate.of(2 * hits.sum(axis=1) >= length, seed=seed),
             "needle_bag_rate": Rate.of(found.in_bag, seed=seed)}
    if found.forced_rank is not None:
        rates["needle_hit_rate_tf"] = Rate.of(found.forced_rank == 0, seed=seed)
        rates["needle_hit_rate_topk"] = Rate.of(found.forced_rank < top_k, seed=seed)
    if found.echo is not None:
        rates["needle_echo_rate"] = Rate.of(found.echo, seed=seed)
    if found.echo_haystack is not None:
        rates["echo_rate_haystack"] = Rate.of(found.echo_haystack, seed=seed)
    return rates


@dataclass(frozen=True, slots=True)
class Nulls:
    """Hit rates of guessers, exact: each step up knows more of the answer."""

    uniform: float
    """Any id of the pool."""
    context_bag: float
    """Any place of the context."""
    needle_bag: float
    """Any token of the needle: knows the set, not the order."""

    @classmethod
    def of(cls, *, pool_size: int, context_len: int, needle_len: int, top_k: int = 1) -> Nulls:
        """Of guessers with `top_k` different guesses."""
        return cls(*(min(1.0, top_k / n) for n in (pool_size, context_len, needle_len)))

    @property
    def strongest(self) -> float:
        """The highest of them."""
        return max(self.uniform, self.context_bag, self.needle_bag)


def hits_needed(trials: int, probability: float, alpha: float = 1e-3) -> int:
    """The least number of hits that chance reaches with less than `alpha` (binomial: optimistic about clustering)."""
    low, high = 0, trials + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if binomial_tail(middle, trials, probability) < alpha else (middle + 1, high)
        if low > trials:
            break
    return low


@dataclass(frozen=True, slots=True)
class DistanceBin:
    """Hits of the examples whose needle lies between `low` and `high` tokens before the first answer."""

    low: int
    high: int
    rate: Rate


def by_distance(hits: BoolArray, distance: Sequence[int] | I64Array, bins: int, *, seed: int = 0) -> list[DistanceBin]:
    """Rates of [N, L] hits in up to `bins` groups of about equally many examples, nearest first."""
    distances = np.asarray(distance)
    order = np.argsort(distances, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    return [DistanceBin(int(distances[group[0]]), int(distances[group[-1]]), Rate.of(hits[group], seed=seed))
            for group in groups]
