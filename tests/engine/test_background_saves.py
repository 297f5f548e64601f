"""Checkpoints that are written while training goes on, from the launches of 1 and 2 ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import background_cases, rewind_cases
from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("key", background_cases.STAGES)
def test_a_save_in_the_background_holds_the_state_of_its_moment(disturbed: dict[str, Any], key: str) -> None:
    found = case(disturbed, "behind_training")[key]
    assert found["files"] >= 6
    assert found["equal"]


@pytest.mark.parametrize("key", background_cases.STAGES)
def test_it_is_invisible_until_the_last_rank_has_written(disturbed: dict[str, Any], key: str) -> None:
    found = case(disturbed, "behind_training")[key]
    *others, late = found["before"]
    assert all(seen == [[], True, True] for seen in others)
    assert late == [[], True, False]
    assert found["after"] == [[background_cases.SAVED], False]


@pytest.mark.parametrize("key", background_cases.STAGES)
def test_a_run_goes_on_from_it_to_the_same_bits(disturbed: dict[str, Any], key: str) -> None:
    found = case(disturbed, "behind_training")[key]
    assert found["begun"] == background_cases.SAVED
    assert found["same"]


@pytest.mark.parametrize("what, ended, steps", [("stop", [True, 7], [7]), ("save", [True, [7]], [7, 8]),
                                                ("end", [0, 14], [7, 14]), ("diverged", None, [7])])
def test_what_follows_waits_for_it(disturbed: dict[str, Any], what: str, ended: Any, steps: list[int]) -> None:
    found = case(disturbed, "behind_what_follows")[what]
    assert found.get("ended") == ended
    assert found["steps"] == steps
    assert not found["pending"]


def test_a_return_after_a_spike_goes_to_the_save_that_is_on_its_way(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "behind_what_follows")
    behind, plain = found["return"], found["return-plain"]
    assert (behind["pending"], plain["pending"]) == (True, False)
    assert behind["rewinds"][0]["checkpoint"] == f"step-{rewind_cases.CHECKPOINT}.f1"
    assert behind | {"pending": False} == plain


def test_a_full_disk_is_one_line_with_what_it_lacks_and_leaves_nothing_half(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "full_disk")
    assert found["behind"] == found["waited"]
    assert found["waited"]["left"] == ["latest", "step-3.f1"]
    assert not found["waited"]["pending"]
    lines = {line for _, line, _ in found["waited"]["told"]}
    assert {code for code, _, _ in found["waited"]["told"]} == {2}
    (line,) = lines
    rank = len(found["waited"]["told"]) - 1
    assert f"step-7/deepspeed/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt: cannot be written (No space left" in line
    missing = int(line.partition("): ")[2].partition(" more bytes")[0].replace(",", ""))
    assert 10_000 < missing < found["waited"]["whole"]
