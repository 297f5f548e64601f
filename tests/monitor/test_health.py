from __future__ import annotations

import json
import math
import random

import pytest

from pretrain.errors import Divergence
from pretrain.monitor.health import BadSteps, Health, SpikeDetector


def curve(count: int, seed: int = 0) -> list[float]:
    """A falling, noisy loss."""
    noise = random.Random(seed)
    return [10 * (step + 1) ** -0.2 + noise.gauss(0, 0.05) for step in range(count)]


def test_bad_steps_in_a_row_end_the_run_with_the_numbers():
    bad = BadSteps(3)
    for k, finite in enumerate([True, False, False, True, False, False]):
        bad.update(k, finite, math.nan if not finite else 1.0, 1.0)
    assert bad.skipped == [1, 2, 4, 5]
    with pytest.raises(Divergence, match=r"last 3 updates .*batches 4 to 6; last loss nan, gradient norm inf"):
        bad.update(6, False, math.nan, math.inf)


def test_bad_steps_now_and_then_end_the_run_too():
    bad = BadSteps(3, max_per_1000=4)
    for k in range(3000):
        bad.update(k, k % 300 != 0, math.nan, 1.0)  # four in 1000, as 0, 300, 600 and 900
        if k == 899:
            break
    with pytest.raises(Divergence, match=r"^4 of the last 1000 updates were not finite \(batches 0 to 900;"):
        bad.update(900, False, math.nan, 1.0)
    rare = BadSteps(3, max_per_1000=4)
    for k in range(5000):
        rare.update(k, k % 334 != 0, math.nan, 1.0)
    assert len(rare.skipped) == 15


def test_bad_steps_in_a_row_are_remembered_over_a_restart():
    before, after = BadSteps(2), BadSteps(2)
    before.update(7, False, math.nan, 1.0)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    with pytest.raises(Divergence, match="batches 7 to 8"):
        after.update(8, False, math.nan, 1.0)


def test_an_ordinary_run_raises_no_alarm():
    for seed in range(5):
        detector = SpikeDetector("loss_spike")
        assert [detector.update(step, loss) for step, loss in enumerate(curve(3000, seed))] == [None] * 3000


def test_a_constant_series_with_tiny_noise_raises_no_alarm():
    detector = SpikeDetector("loss_spike")
    assert not any(detector.update(step, 2.0 + 1e-6 * (step % 7 == 0)) for step in range(500))


def test_a_loss_that_has_come_down_to_nothing_has_no_spikes_but_real_ones():
    detector = SpikeDetector("loss_spike")
    assert not any(detector.update(step, 1e-8 * (step % 40 == 39)) for step in range(200))
    assert detector.update(200, 0.5) is not None


def test_a_spike_is_found_at_its_step_and_does_not_blind_the_next():
    losses = curve(1000)
    losses[500] += 3.0
    losses[503] += 3.0
    detector = SpikeDetector("loss_spike")
    alarms = [alarm for alarm in (detector.update(step, loss) for step, loss in enumerate(losses)) if alarm]
    assert [alarm.step for alarm in alarms] == [500, 503]
    assert "step 500: loss" in str(alarms[0])


def test_a_new_level_stops_alarming_once_it_fills_half_the_window():
    detector = SpikeDetector("loss_spike", window=64)
    noise = random.Random(1)
    alarms = [detector.update(step, (3.0 if step < 200 else 6.0) + noise.gauss(0, 0.02)) for step in range(400)]
    raised = [step for step, alarm in enumerate(alarms) if alarm]
    assert raised == list(range(200, raised[-1] + 1))
    assert 200 + 20 < raised[-1] < 200 + 40


def test_a_fall_is_no_spike():
    detector = SpikeDetector("loss_spike")
    for step, loss in enumerate(curve(100)):
        detector.update(step, loss)
    assert detector.update(100, 0.0) is None


def test_health_goes_on_after_a_restart_as_if_there_was_none():
    losses = curve(400)
    losses[300] = 60.0
    whole, first, second = Health(3), Health(3), Health(3)
    expected, got = [], []
    for step, loss in enumerate(losses):
        finite = step % 50 != 49
        expected.append(whole.update(step, step, finite, loss, loss / 10))
        got.append((first if step < 290 else second).update(step, step, finite, loss, loss / 10))
        if step == 289:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got == expected
    assert {alarm.kind for alarm in expected[300]} == {"loss_spike", "grad_spike"}
    assert second.bad_steps.skipped == list(range(49, 400, 50))


def test_a_dead_gradient_is_told():
    assert [alarm.kind for alarm in Health(3).update(1, 1, True, 2.0, 0.0)] == ["grad_zero"]


def test_skipped_updates_do_not_enter_the_running_figures():
    health = Health(10**6)
    for step in range(100):
        assert health.update(step, step, step % 2 == 0, 2.0 if step % 2 == 0 else math.inf, math.nan
                             if step % 2 else 1.0) == []
    assert len(health.state_dict()["loss"]["values"]) == 50


def test_a_spike_that_is_skipped_leaves_the_median_and_counts_towards_the_end():
    health = Health(3)
    for step, loss in enumerate(curve(100)):
        health.update(step, step, True, loss, 1.0)
    before = health.state_dict()["loss"]
    for k in (100, 101):
        assert health.spike(100, 40.0).kind == "loss_spike"
        health.update(100, k, False, 40.0, math.nan, spike=True)
    assert health.state_dict()["loss"] == before
    again = Health(3)
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert again.bad_steps.spikes == [100, 101]
    with pytest.raises(Divergence, match=r"last 3 updates were not finite or loss spikes \(batches 100 to 102"):
        again.update(100, 102, False, math.nan, math.nan)
    assert health.spike(100, math.nan) is None


def test_a_gradient_above_a_familys_limit_is_told_of_at_its_update_and_once():
    health, told = Health(10, grad_warn=100.0), []
    for step, norm in enumerate([5.0, 99.0, 101.0, 250.0, 90.0, 120.0, 100.0]):
        told += [str(alarm) for alarm in health.update(step, step, True, 1.0, norm)]
    assert told == [f"step {step}: gradient norm {norm:g} before clipping is above 100: beyond warm-up, lower "
                    "optim.lr or lengthen schedule.warmup" for step, norm in ((2, 101), (5, 120))]
    assert not Health(10).update(0, 0, True, 1.0, 1e9)
