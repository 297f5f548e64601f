"""`train.on_spike: rewind`, from the launches of one and two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import rewind_cases
from tests.engine.rewind_cases import CHECKPOINT, LENGTH, SPIKE
from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.slow]
PASSED = SPIKE + 1 - CHECKPOINT


@pytest.mark.parametrize("key", rewind_cases.KEYS)
def test_after_a_spike_on_one_rank_the_run_is_the_one_that_never_saw_those_batches(disturbed: dict[str, Any], key: str
                                                                                   ) -> None:
    found = case(disturbed, "rewinds")[key]
    assert found["spike"]["digest"] == found["jump"]["digest"]
    assert (found["spike"]["step"], found["spike"]["k"]) == (LENGTH, LENGTH + PASSED)
    assert found["jump"]["rewinds"] == []
    (record,) = found["spike"]["rewinds"]
    assert (record["k"], record["to_step"], record["to_k"]) == (SPIKE, CHECKPOINT, CHECKPOINT)
    assert record["checkpoint"] == f"step-{CHECKPOINT}.f1"
    assert found["spike"]["skipped"] == []


@pytest.mark.parametrize("key", ["2", "contrastive-2"])
def test_a_return_is_told_and_the_record_holds_each_step_once(disturbed: dict[str, Any], key: str) -> None:
    found = case(disturbed, "rewinds")[key]
    (line,) = [line for line in found["lines"] if "passed over" in line]
    assert f"batch {SPIKE}: step {SPIKE}: loss" in line
    assert f"back to {line.split('back to ')[1].split(' ')[0]} (step {CHECKPOINT}), on with batch {SPIKE + 1}" in line
    assert f"{PASSED} batches are passed over (return 1 of 3 to this step)" in line
    assert found["rows"] == list(range(1, LENGTH + 1))
    (row,) = found["told"]
    assert (row["step"], row["k"], row["rewind/batch"], row["rewind/step"]) == (CHECKPOINT, SPIKE + 1, SPIKE, SPIKE)
    assert row["rewind/loss"] == found["spike"]["rewinds"][0]["loss"] > 0


def test_a_run_killed_around_a_return_ends_with_the_same_bits(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_killed")
    assert (found["before"]["at_step"], found["before"]["at_k"]) == (CHECKPOINT, CHECKPOINT)
    assert (found["after"]["at_step"], found["after"]["at_k"]) == (CHECKPOINT, SPIKE + 1)
    assert len(found["never"]["rewinds"]) == 1
    for when in ("before", "after"):
        assert found[when]["digest"] == found["never"]["digest"], when
        assert found[when]["rewinds"] == found["never"]["rewinds"], when


def test_without_a_checkpoint_a_spike_is_skipped_and_that_is_said(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_end")["early-2"]
    assert (found["skipped"], found["rewinds"], found["step"], found["k"]) == ([SPIKE], [], LENGTH, LENGTH + 1)
    assert any(line == f"batch {SPIKE}: there is no checkpoint to go back to yet; the update is skipped"
               for line in found["lines"])
    other = case(disturbed, "rewinds_end")["early-contrastive-2"]
    assert (other["skipped"], other["rewinds"], other["k"]) == ([], [], LENGTH)
    assert any("the update is applied, as this objective knows its loss too late" in line for line in other["lines"])


def test_a_spike_on_one_rank_is_told_by_the_loss_of_all(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_end")["warn"]
    assert (found["skipped"], found["rewinds"], found["k"]) == ([], [], LENGTH)
    (line,) = [line for line in found["lines"] if "deviations" in line and ": loss" in line]
    assert line.startswith(f"step {SPIKE + 1}: loss")


def test_a_run_that_does_not_get_past_a_step_ends_with_4(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_end")["stuck"]
    assert found["code"] == 4
    assert f"2 returns to step {CHECKPOINT} did not lead past it" in found["message"]
    assert f"(batches {SPIKE}, {SPIKE + 1}, {SPIKE + 2})" in found["message"]
    assert "train.max_rewinds" in found["message"]
    assert [(r["k"], r["to_step"]) for r in found["rewinds"]] == [(SPIKE, CHECKPOINT), (SPIKE + 1, CHECKPOINT)]


def test_too_many_updates_in_a_row_that_are_not_finite_are_a_reason_too(disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_end")["not finite"]
    (record,) = found["rewinds"]
    assert (record["k"], record["loss"], record["to_k"]) == (SPIKE + 2, None, CHECKPOINT)
    assert (found["step"], found["k"], found["skipped"]) == (LENGTH, LENGTH + PASSED + 2, [])
    assert any("the last 3 updates were not finite" in line and "back to" in line for line in found["lines"])


def test_a_damaged_checkpoint_is_passed_over_by_a_return_and_never_taken_for_the_newest(
        disturbed: dict[str, Any]) -> None:
    found = case(disturbed, "rewinds_end")["damaged"]
    assert found["rewinds"][0]["to_step"] == CHECKPOINT / 2
    assert found["k"] == LENGTH + SPIKE + 1 - CHECKPOINT / 2
    assert found["names"] == ["damaged-step-32.f1", "step-16.f1", "step-32.f1", "step-40.f1"]
