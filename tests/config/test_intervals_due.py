import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pretrain.config.interval import UNITS, Interval, Progress

QUIET = settings(deadline=None, derandomize=True, max_examples=200)
amounts = st.one_of(st.integers(1, 50).map(float), st.sampled_from([0.1, 0.25, 1 / 3, 1.5]))


@QUIET
@given(amount=amounts, unit=st.sampled_from(UNITS), jumps=st.lists(st.integers(0, 120), min_size=1, max_size=30))
def test_due_fires_once_for_each_reached_multiple_and_names_the_newest(amount, unit, jumps):
    if unit != "epochs":
        amount = math.ceil(amount)
    interval = Interval(float(amount), unit)
    epoch = 20
    scale = epoch if unit == "epochs" else 1
    reached, fired, count = 0, [], 0
    for jump in jumps:
        before, count = count, count + jump
        fields = {"samples": (before, count)} if unit == "epochs" else {unit: (before, count)}
        old, new = (Progress(epoch_samples=epoch, **{k: v[i] for k, v in fields.items()}) for i in (0, 1))
        result = interval.due(old, new)
        # The reference: count multiples one by one.
        newest = reached
        while (newest + 1) * amount * scale <= count + 1e-9:
            newest += 1
        if newest > reached:
            assert result == int(newest * amount)
            fired.append(newest)
        else:
            assert result is None
        reached = newest
    assert len(fired) == len(set(fired))


@QUIET
@given(step=st.integers(1, 10**6), size=st.integers(1, 1000))
def test_a_multiple_fires_at_the_first_update_at_or_past_it(step, size):
    interval = Interval(float(size), "micro_steps")
    accumulation = 7
    before = Progress(micro_steps=(step - 1) * accumulation)
    after = Progress(micro_steps=step * accumulation)
    due = interval.due(before, after)
    multiples = [m for m in range((step - 1) * accumulation + 1, step * accumulation + 1) if m % size == 0]
    assert due == (multiples[-1] if multiples else None)


@pytest.mark.parametrize(("text", "amount", "unit"), [
    ("2000 steps", 2000, "steps"), ("1 step", 1, "steps"), ("10M tokens", 10_000_000, "tokens"),
    ("1.5B tokens", 1_500_000_000, "tokens"), ("0.5 epochs", 0.5, "epochs"), ("500 micro_steps", 500, "micro_steps"),
    ("2.5K samples", 2500, "samples"), ("20B tokens", 20 * 10**9, "tokens"),
])
def test_parse(text, amount, unit):
    assert Interval.parse(text) == Interval(amount, unit)


@QUIET
@given(amount=st.integers(1, 10**15), unit=st.sampled_from(UNITS))
def test_text_of_an_interval_parses_to_it(amount, unit):
    interval = Interval(float(amount), unit)
    assert Interval.parse(str(interval)) == interval
    assert TypeAdapter(Interval).validate_python(str(interval)) == interval


@pytest.mark.parametrize("text", ["", "10", "steps", "-1 steps", "0 steps", "1.5 tokens", "10 m tokens", "1e3 steps",
                                  "10 steps 20", "10 Steps", "10Q tokens"])
def test_what_is_no_interval_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match=f'^"{text}"'):
        Interval.parse(text)


def test_length_in_updates():
    sizes = {"micro_steps_per_step": 4, "samples_per_step": 32, "tokens_per_step": 32 * 128, "epoch_samples": 1000}
    cases = {"10 steps": 10, "10 micro_steps": 2, "100 samples": 3, "10K tokens": 2, "1 epochs": 31, "0.5 epochs": 15,
             "1 tokens": 1}
    for text, steps in cases.items():
        assert Interval.parse(text).to_steps(**sizes) == steps
    with pytest.raises(ValueError, match="no epochs"):
        Interval.parse("1 epochs").to_steps(**{**sizes, "epoch_samples": None})
    with pytest.raises(ValueError, match="no epochs"):
        Interval.parse("1 epochs").due(Progress(), Progress(samples=5))
