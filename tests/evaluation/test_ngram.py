"""The n-gram baselines against a slow dictionary-based reference, and the properties that make them honest."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.ngram import NGramModel, Predictions
from pretrain.errors import UserError


def reference_probability(train, order, vocab, context, target):
    """Chen and Goodman's formulas, one probability at a time; contexts run from the farthest token to the nearest."""
    levels = {order: Counter(train)}
    for lower in range(order - 1, 0, -1):
        levels[lower] = Counter(gram[1:] for gram in levels[lower + 1])

    def discounts(counts):
        n = [sum(1 for c in counts.values() if c == i) for i in range(1, 5)]
        if 0 in n:
            return 0.5, 1.0, 1.5
        y = n[0] / (n[0] + 2 * n[1])
        d = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
        return tuple(d) if all(0 < x <= i + 1 for i, x in enumerate(d)) else (0.5, 1.0, 1.5)

    def p(level, ctx):
        if level == 0:
            return 1.0 / vocab
        ctx = ctx[len(ctx) - level + 1:]
        counts = levels[level]
        followers = {g[-1]: c for g, c in counts.items() if g[:-1] == ctx}
        if not followers:
            return p(level - 1, ctx)
        d = discounts(counts)
        taken = sum(d[min(c, 3) - 1] for c in followers.values())
        own = followers.get(target, 0)
        kept = own - d[min(own, 3) - 1] if own else 0.0
        return (kept + taken * p(level - 1, ctx)) / sum(followers.values())

    return p(order, context)


def windows(rng, rows, cols, vocab, documents=True):
    """Skewed random windows with document edges, and labels shifted by one."""
    ids = np.minimum(rng.geometric(0.25, size=(rows, cols + 1)) - 1, vocab - 1)
    docs = np.cumsum(rng.random((rows, cols + 1)) < 0.15, axis=1) if documents else np.zeros((rows, cols + 1), int)
    labels = np.where(docs[:, 1:] == docs[:, :-1], ids[:, 1:], -100)
    return ids[:, :-1], labels, docs[:, :-1]


def slow_predictions(ids, labels, docs, vocab):
    """(before, previous, target) of each labelled place, one by one."""
    made = []
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if labels[b, t] >= 0:
                alone = t == 0 or docs[b, t - 1] != docs[b, t]
                made.append((vocab if alone else int(ids[b, t - 1]), int(ids[b, t]), int(labels[b, t])))
    return made


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 12), st.integers(1, 8), st.integers(2, 30))
def test_probabilities_equal_the_dictionary_reference(seed, order, vocab, rows, cols):
    rng = np.random.default_rng(seed)
    train_windows, test_windows = windows(rng, rows, cols, vocab), windows(rng, 2, 8, vocab)
    train, test = (Predictions.from_windows(*w, vocab) for w in (train_windows, test_windows))
    if not len(train):
        return
    grams = [g[3 - order:] for g in slow_predictions(*train_windows, vocab)]
    expected = [reference_probability(grams, order, vocab, g[:2], g[2]) for g in slow_predictions(*test_windows, vocab)]
    model = NGramModel.fit(train, order, vocab)
    assert model.order == order
    np.testing.assert_allclose(model.probabilities(test), expected, rtol=1e-12)
    assert model.nll_sum(test) == pytest.approx(-sum(map(math.log, expected)), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_context_has_a_distribution(order):
    vocab = 40
    rng = np.random.default_rng(1)
    model = NGramModel.fit(Predictions.from_windows(*windows(rng, 60, 64, vocab), vocab), order, vocab)
    for previous, before in [(0, 0), (3, 1), (39, 38), (2, vocab), (vocab, vocab)]:
        every = Predictions(np.arange(vocab), np.full(vocab, previous), np.full(vocab, before))
        chances = model.probabilities(every)
        assert chances.min() > 0
        assert chances.sum() == pytest.approx(1.0, abs=1e-12)


def test_contexts_never_cross_documents_or_windows():
    """Swapping what stands in another document or window leaves every prediction as it was."""
    vocab = 20
    rng = np.random.default_rng(2)
    ids, labels, docs = windows(rng, 6, 40, vocab)
    inside = (docs == docs[:, :1]) & (np.arange(6)[:, None] < 3)
    changed = np.where(inside, ids, (ids + 7) % vocab)
    kept = Predictions.from_windows(ids, np.where(inside, labels, -100), docs, vocab)
    other = Predictions.from_windows(changed, np.where(inside, labels, -100), docs, vocab)
    for name in ("target", "previous", "before_previous"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(other, name))
    # the first input of a document has nothing before it
    first = np.ones_like(docs, dtype=bool)
    first[:, 1:] = docs[:, 1:] != docs[:, :-1]
    at_first = Predictions.from_windows(ids, np.where(first, labels, -100), docs, vocab)
    assert (at_first.before_previous == vocab).all() and len(at_first) > 10


def test_more_context_helps_where_there_is_structure():
    """A second-order source: each order beats the one below, and the trigram comes near the source's entropy."""
    vocab, rng = 12, np.random.default_rng(3)
    table = rng.dirichlet(np.full(vocab, 0.08), size=(vocab, vocab))
    stream = [0, 1]
    draws = rng.random(60_000)
    cumulative = table.cumsum(-1)
    for u in draws:
        stream.append(min(int(np.searchsorted(cumulative[stream[-2], stream[-1]], u)), vocab - 1))
    ids = np.array(stream[: 60_000 // 100 * 100 + 1])
    inputs, labels = ids[:-1].reshape(-1, 100), ids[1:].reshape(-1, 100)
    train = Predictions.from_windows(inputs[:500], labels[:500], None, vocab)
    test = Predictions.from_windows(inputs[500:], labels[500:], None, vocab)
    losses = [NGramModel.fit(train, order, vocab).nll_sum(test) / len(test) for order in (1, 2, 3)]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2
    known = test.before_previous < vocab
    source = -np.log(table[test.before_previous[known], test.previous[known], test.target[known]]).mean()
    assert losses[2] < source + 0.1


def test_join_keeps_order():
    vocab, rng = 9, np.random.default_rng(4)
    ids, labels, docs = windows(rng, 8, 16, vocab)
    whole = Predictions.from_windows(ids, labels, docs, vocab)
    parts = Predictions.join(Predictions.from_windows(ids[i:i + 2], labels[i:i + 2], docs[i:i + 2], vocab)
                             for i in range(0, 8, 2))
    np.testing.assert_array_equal(whole.target, parts.target)
    np.testing.assert_array_equal(whole.before_previous, parts.before_previous)
    assert len(Predictions.join([])) == 0


def test_refusals_name_the_value():
    some = Predictions(np.array([1]), np.array([0]), np.array([2]))
    with pytest.raises(UserError, match="order 4"):
        NGramModel.fit(some, 4, 2)
    with pytest.raises(UserError, match="3000000"):
        NGramModel.fit(some, 3, 3_000_000)
    with pytest.raises(UserError, match="none"):
        NGramModel.fit(Predictions.join([]), 2, 5)
    with pytest.raises(UserError, match="vocabulary size 5"):
        Predictions.from_windows(np.array([[5]]), np.array([[1]]), None, 5)


def test_reference_uses_both_discount_rules():
    """Guards the test above: among its cases both estimated and fallback discounts occur."""
    from evaluation.ngram import _FALLBACK_DISCOUNTS, _discounts
    rng = np.random.default_rng(5)
    seen = defaultdict(int)
    for _ in range(20):
        train = Predictions.from_windows(*windows(rng, 8, 30, 12), 12)
        _, counts = np.unique(train.keys(3, 13), return_counts=True)
        seen[_discounts(counts) == _FALLBACK_DISCOUNTS] += 1
    assert seen[True] and seen[False]
