"""Filters and draws against slow references over plain lists."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation.sampling import (
    Sampling,
    keep_top_k,
    keep_top_p,
    next_token,
    penalise_repetition,
    uniforms,
)
from pretrain.errors import UserError

logit_rows = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=20)
cases = settings(deadline=None, derandomize=True, max_examples=150)


def ranked(row):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


@cases
@given(logit_rows, st.integers(0, 25))
def test_top_k_keeps_the_k_first_of_a_stable_ranking(row, k):
    kept = set(ranked(row)[:k]) if k else set(range(len(row)))
    expected = [x if i in kept else -math.inf for i, x in enumerate(row)]
    assert keep_top_k(torch.tensor([row]), k)[0].tolist() == pytest.approx(expected)


@cases
@given(logit_rows, st.integers(1, 100))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row, percent):
    p = percent / 100 + 1e-4
    weights = [math.exp(x) for x in row]
    kept, mass = [], 0.0
    for i in ranked(row):
        if kept and mass >= p:
            break
        kept.append(i)
        mass += weights[i] / math.fsum(weights)
    got = keep_top_p(torch.tensor([row], dtype=torch.float64), p)[0]
    assert {i for i, x in enumerate(got.tolist()) if x > -math.inf} == set(kept)


@cases
@given(logit_rows, st.integers(11, 30), st.data())
def test_penalty_lowers_seen_tokens_and_nothing_else(row, tenths, data):
    penalty = tenths / 10
    seen = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    got = penalise_repetition(torch.tensor([row], dtype=torch.float64), torch.tensor([seen]), penalty)[0].tolist()
    for x, y, s in zip(row, got, seen, strict=True):
        assert y == (x if not s else x / penalty if x > 0 else x * penalty)
        assert y <= x


def test_neutral_settings_change_nothing():
    logits = torch.randn(4, 50)
    assert keep_top_k(logits, 0) is logits and keep_top_k(logits, 50) is logits and keep_top_p(logits, 1.0) is logits
    assert penalise_repetition(logits, torch.ones(4, 50, dtype=torch.bool), 1.0) is logits


def test_draws_follow_the_distribution():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    sampling = Sampling(temperature=0.7, top_k=8, top_p=0.97)
    n = 20_000
    drawn = next_token(logits.expand(n, -1), torch.zeros(n, 12, dtype=torch.bool), uniforms(5, [0], n)[0], sampling)
    chances = torch.softmax(keep_top_p(keep_top_k(logits.double() / 0.7, 8), 0.97), -1)[0].numpy()
    counts = np.bincount(drawn.numpy(), minlength=12)
    assert counts[chances == 0].sum() == 0 and (chances == 0).sum() >= 4
    assert stats.chisquare(counts[chances > 0], n * chances[chances > 0] / chances.sum()).pvalue > 1e-3


def test_extreme_draws_never_pick_an_impossible_token():
    logits = torch.full((2, 30), -torch.inf)
    logits[:, [4, 9]] = torch.tensor([0.0, 1.0])
    draw = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert next_token(logits, torch.zeros(2, 30, dtype=torch.bool), draw, Sampling()).tolist() == [4, 9]


def test_temperature_zero_is_argmax_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    one = torch.tensor([[False, True, False]])
    draw = torch.zeros(1, dtype=torch.float64)
    assert next_token(logits, none, draw, Sampling(temperature=0)).item() == 1
    assert next_token(logits, one, draw, Sampling(temperature=0, repetition_penalty=1.5)).item() == 2


def test_uniforms_depend_on_seed_and_sample_only():
    together = uniforms(3, [0, 7, 2], 10)
    assert torch.equal(together[1], uniforms(3, [7], 10)[0])
    assert torch.equal(uniforms(3, [7], 4)[0], together[1, :4])
    assert not torch.equal(uniforms(4, [7], 10)[0], together[1]) and not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
                                              ("repetition_penalty", 0.0)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=str(value)):
        Sampling(**{field: value})
