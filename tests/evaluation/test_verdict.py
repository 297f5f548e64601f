"""Each way out of the decision rule."""

import numpy as np
import pytest

from evaluation.verdict import decide
from pretrain.metrics.needle import Nulls, Rate

NULLS = Nulls.of(pool_size=31800, context_len=512, needle_len=16)
NONE = Rate.of(np.zeros((200, 16), bool))


def rate(value: float, examples: int = 200) -> Rate:
    """Hits spread evenly over examples, so that the interval is narrow."""
    hits = np.zeros((examples, 16), bool)
    hits.ravel()[np.linspace(0, hits.size - 1, round(value * hits.size)).astype(int)] = True
    return Rate.of(hits)


def verdict(value: float, *, shuffled=NONE, null=NONE, examples=200):
    return decide(rate(value, examples), NULLS, examples=examples, shuffled=shuffled, null_adapter=null)


@pytest.mark.parametrize("value, arguments, outcome, words", [
    (0.99, {}, "retrieval", "above every null (6.25%)"),
    (0.99, {"shuffled": rate(0.01)}, "leak", "the old one is still given"),
    (0.0, {"shuffled": rate(0.5)}, "leak", "no retrieval"),
    (0.0, {}, "no retrieval", "guessing any id gives"),
    (0.0003, {}, "no retrieval", "guessing any id gives"),
    (0.002, {}, "no retrieval", "guessing any token of the context (0.20%)"),
    (0.06, {}, "no retrieval", "without their order (6.25%)"),
    (0.99, {"examples": 100}, "undecided", "100 examples are fewer than 200"),
    (0.99, {"shuffled": None}, "undecided", "--controls"),
    (0.99, {"null": None}, "undecided", "--null RUN"),
    (0.30, {"null": rate(0.30)}, "no retrieval", "the null adapter, which has none")])
def test_every_branch(value, arguments, outcome, words):
    found = verdict(value, **arguments)
    assert found.outcome == outcome
    assert words in found.words


def test_nothing_is_claimed_without_a_margin_over_the_null_adapter_s_interval():
    """Point estimates would claim; intervals over whole needles do not."""
    ours, null = (Rate.of(np.repeat(np.arange(200)[:, None] < whole, 16, axis=1)) for whole in (60, 56))
    assert ours.value > null.value
    assert decide(ours, NULLS, examples=200, shuffled=NONE, null_adapter=null).outcome == "no retrieval"
    assert decide(ours, NULLS, examples=200, shuffled=NONE, null_adapter=rate(0.05)).outcome == "retrieval"


def test_at_chance_asks_what_chance_alone_reaches():
    assert rate(2 / 3200).at_chance(NULLS.uniform)
    assert not rate(3 / 3200).at_chance(NULLS.uniform)
    assert rate(2 / 3200).at_chance(NULLS.context_bag)


def test_many_hits_in_one_example_are_one_piece_of_evidence():
    wandering = Rate.of(np.arange(200)[:, None] * np.ones(16) < 2)
    assert wandering.hits == 32
    assert wandering.examples_hit == 2
    assert wandering.at_chance(NULLS.context_bag)
    assert not Rate.of(np.arange(200)[:, None] * np.ones(16) < 6).at_chance(NULLS.context_bag)


def test_one_whole_needle_out_of_nothing_is_a_leak():
    """With other ids in its place nothing of it is left to wander into."""
    one = Rate.of(np.arange(200)[:, None] * np.ones(16) < 1)
    assert one.at_chance(NULLS.uniform)
    assert not one.at_uniform_chance(NULLS.uniform)
    assert rate(2 / 3200).at_uniform_chance(NULLS.uniform)
    assert not rate(3 / 3200).at_uniform_chance(NULLS.uniform)
    assert decide(rate(0.99), NULLS, examples=200, shuffled=one, null_adapter=NONE).outcome == "leak"


def test_needles_found_whole_are_no_chance_however_many_examples_chance_would_hit():
    """At 1/16 a token, chance hits 129 of 200 examples and may hit 149 of them."""
    for found, probability, expected in ((16, NULLS.needle_bag, True), (40, NULLS.needle_bag, False),
                                         (149, NULLS.needle_bag, False), (15, NULLS.context_bag, False)):
        whole = Rate.of(np.arange(200)[:, None] * np.ones(16) < found)
        assert whole.at_chance(probability) is expected, found
    once_each = np.zeros((200, 16), bool)
    once_each[:, 0] = True
    assert not Rate.of(once_each).at_chance(NULLS.needle_bag), "every example is hit"
    guesses = np.random.default_rng(0).random((200, 16)) < NULLS.needle_bag
    assert Rate.of(guesses).at_chance(NULLS.needle_bag)
