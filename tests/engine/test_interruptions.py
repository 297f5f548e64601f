"""Stops in the middle of an evaluation, and evaluations judged otherwise than before; launches of one and two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.interruption_cases import FORWARDS
from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.mark.parametrize("when", ["middle", "final", "both"])
def test_an_evaluation_that_was_cut_short_is_made_up_for(disturbed: dict[str, Any], when: str) -> None:
    never, found = case(disturbed, "stopped_evaluation")["never"], case(disturbed, "stopped_evaluation")[when]
    assert never["val"].keys() == {"4", "8", "10"}
    for key in ("val", "digest", "best", "pointer", "owed"):
        assert found[key] == never[key], key


def test_a_stop_in_an_evaluation_ends_with_85_before_it_is_over(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "stopped_evaluation")
    assert found["middle"]["codes"] == found["final"]["codes"] == [85, 0]
    assert found["both"]["codes"] == [85, 85, 0]
    assert found["middle"]["forwards"][0] < FORWARDS
    assert 2 * FORWARDS < found["final"]["forwards"][0] < 3 * FORWARDS


def test_a_run_stopped_in_its_final_evaluation_has_only_that_left(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "stopped_evaluation")["final"]
    assert found["steps"] == [0, 10]
    assert found["forwards"][1] == FORWARDS
    assert found["reason"] == "length reached"


def test_a_run_that_ended_early_goes_on_once_its_patience_is_changed(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "judged_otherwise")
    assert found["ends"]["step"] == found["same"]["step"] == 8
    assert found["ends"]["early"] == found["same"]["early"] == "no improvement of val/loss in 2 evaluations"
    assert (found["patient"]["step"], found["patient"]["early"]) == (12, None)
    assert (found["patient"]["best"], found["patient"]["best_steps"]) == (2.0, [2, 4])


def test_figures_of_other_samples_are_judged_anew(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "judged_otherwise")
    assert (found["other samples"]["best"], found["other samples"]["best_steps"]) == (4.0, [14])
    assert (found["rate"]["best"], found["rate"]["best_steps"]) == (4.0, [14])


def test_a_rate_in_the_config_replaces_the_one_asked_for_before(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "judged_otherwise")
    assert found["other samples"]["override"] == 0.005
    assert found["rate"]["override"] is None
