"""Unigram, bigram and trigram language models: the honest baselines beside every language model.

They are trained on the same tokens, see the same windows and predict the same labelled tokens as the model they stand
beside: no context crosses a document or the edge of a window.

Smoothing is interpolated modified Kneser-Ney: three discounts an order estimated from counts of counts, lower orders
from the number of different words seen before a sequence, the unigram interpolated with the uniform distribution.
Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998), section 3.

Everything is sorting and searching on integer keys; there is no python loop over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pretrain.errors import UserError

MAX_ORDER = 3
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts of counts 1, 2 and 3+ where counts of counts are too few to estimate them (tiny texts, unigrams)."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Tokens to predict, each with the two tokens before it.

    A token that is missing (before a document or window) is the id V, one past the vocabulary.
    """

    target: np.ndarray
    """[n] int64."""
    previous: np.ndarray
    """[n] int64: the token right before the target."""
    before_previous: np.ndarray
    """[n] int64: the token before that."""

    def __len__(self) -> int:
        return int(self.target.size)

    @classmethod
    def from_windows(cls, input_ids: np.ndarray, labels: np.ndarray, document_ids: np.ndarray | None,
                     vocab_size: int) -> Predictions:
        """The predictions a causal model makes on a batch.

        Args:
            input_ids: [B, T].
            labels: [B, T], the token after each input; negative where nothing is predicted.
            document_ids: [B, T], equal for inputs of one document; None: a window is one document.
            vocab_size: V; ids at or above it are refused.
        """
        before = np.full(input_ids.shape, vocab_size, dtype=np.int64)
        before[:, 1:] = input_ids[:, :-1]
        if document_ids is not None:
            before[:, 1:][document_ids[:, 1:] != document_ids[:, :-1]] = vocab_size
        kept = labels >= 0
        made = cls(labels[kept].astype(np.int64), input_ids[kept].astype(np.int64), before[kept])
        if len(made) and max(made.target.max(), made.previous.max()) >= vocab_size:
            raise UserError(f"a token id of the data is at or above the vocabulary size {vocab_size}: "
                            "the data were tokenized with another tokenizer")
        return made

    @classmethod
    def join(cls, parts: Iterable[Predictions]) -> Predictions:
        """All parts as one."""
        held = list(parts)
        empty = np.empty(0, np.int64)
        return cls(*(np.concatenate([getattr(p, name) for p in held]) if held else empty
                     for name in ("target", "previous", "before_previous")))

    def keys(self, order: int, base: int) -> np.ndarray:
        """[n] int64: the last `order` tokens as one number, the target least significant."""
        key = self.target.copy()
        for place, context in enumerate((self.previous, self.before_previous)[:order - 1], start=1):
            key += context * base**place
        return key


@dataclass(frozen=True, slots=True)
class _Level:
    """One order of the model. Keys are sorted."""

    grams: np.ndarray
    """[g] keys of the sequences seen."""
    discounted: np.ndarray
    """[g] float64: (count - discount) / total of the context."""
    contexts: np.ndarray
    """[c] keys of the contexts seen."""
    backoff: np.ndarray
    """[c] float64: share of each context that goes to the lower order."""


class NGramModel:
    """Interpolated modified Kneser-Ney of order 1, 2 or 3."""

    def __init__(self, vocab_size: int, levels: list[_Level]) -> None:
        self.vocab_size = vocab_size
        self._levels = levels

    @classmethod
    def fit(cls, train: Predictions, order: int, vocab_size: int) -> NGramModel:
        """Count and smooth.

        Raises:
            UserError: nothing to count, an order outside 1..3, or a vocabulary whose keys would not fit 63 bits.
        """
        base = vocab_size + 1
        if not 1 <= order <= MAX_ORDER or base**order >= 2**63:
            raise UserError(f"an n-gram of order {order} over {vocab_size} tokens cannot be counted: "
                            f"orders go from 1 to {MAX_ORDER} and (tokens + 1)^order must stay below 2^63")
        if not len(train):
            raise UserError("an n-gram baseline needs at least one labelled training token, there is none")
        grams, counts = np.unique(train.keys(order, base), return_counts=True)
        levels = [_smooth(grams, counts, base)]
        for lower in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % base**lower, return_counts=True)
            levels.append(_smooth(grams, counts, base))
        return cls(vocab_size, levels[::-1])

    @property
    def order(self) -> int:
        """Tokens of the longest sequence counted."""
        return len(self._levels)

    def probabilities(self, predictions: Predictions) -> np.ndarray:
        """[n] float64: probability of each target after its context. Positive everywhere; sums to 1 over targets."""
        base = self.vocab_size + 1
        result = np.full(len(predictions), 1.0 / self.vocab_size)
        for order, level in enumerate(self._levels, start=1):
            keys = predictions.keys(order, base)
            share = _look_up(level.contexts, level.backoff, keys // base, missing=1.0)
            result = _look_up(level.grams, level.discounted, keys, missing=0.0) + share * result
        return result

    def nll_sum(self, predictions: Predictions) -> float:
        """Sum over the predictions of the negative log-likelihood, in nats."""
        return float(-np.log(self.probabilities(predictions)).sum())


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Discounts of counts 1, 2 and 3+: D_i = i - (i + 1) * Y * n_{i+1} / n_i with Y = n_1 / (n_1 + 2 n_2)."""
    n = [int(np.count_nonzero(counts == i)) for i in range(1, 5)]
    if min(n) == 0:
        return _FALLBACK_DISCOUNTS
    y = n[0] / (n[0] + 2 * n[1])
    found = tuple(i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3))
    if not all(0 < d <= i for i, d in enumerate(found, start=1)):
        return _FALLBACK_DISCOUNTS
    return found[0], found[1], found[2]


def _smooth(grams: np.ndarray, counts: np.ndarray, base: int) -> _Level:
    """The level of sorted keys with their counts. Keys of one context stand together: the target is the last digit."""
    of_gram = np.array((0.0, *_discounts(counts)))[np.minimum(counts, 3)]
    contexts, first, grams_of = np.unique(grams // base, return_index=True, return_counts=True)
    total = np.add.reduceat(counts, first).astype(np.float64)
    backoff = np.add.reduceat(of_gram, first) / total
    return _Level(grams, (counts - of_gram) / np.repeat(total, grams_of), contexts, backoff)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, *, missing: float) -> np.ndarray:
    """values[i] where keys[i] == wanted, else `missing`; keys are sorted and not empty."""
    places = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[places] == wanted, values[places], missing)
