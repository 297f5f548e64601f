"""Single features of a run, from the one-rank launch."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.engine.world import case

pytestmark = pytest.mark.launch


def test_deepspeed_files_train_with_plain_deepspeed(one: dict[str, Any]) -> None:
    for stage, losses in case(one, "plain_deepspeed_json").items():
        assert losses[-1] < losses[0], stage


def test_weights_and_nothing_else_travel_to_a_new_run(one: dict[str, Any]) -> None:
    found = case(one, "init_from")
    assert found["difference"] == 0.0
    assert found["step"] == 0
    assert "embed.weight is (64, 16)" in found["message"]
    assert "(64, 8)" in found["message"]


def test_deepspeed_does_what_was_written(one: dict[str, Any]) -> None:
    found = case(one, "readback")
    assert found.pop("changed") == ["gradient_clipping: asked 7.0, DeepSpeed uses 1.0"]
    assert all(lines == [] for lines in found.values()), found


def test_plateau_cuts_and_patience_ends(one: dict[str, Any]) -> None:
    found = case(one, "plateau_and_patience")
    assert (found["step"], found["factor"], found["best"]) == (12, 0.25, 2.0)
    assert found["reason"] == "no improvement of val/loss in 4 evaluations"
    assert found["best_steps"] == [2, 4]
    assert found["pointer"] == 4


def test_training_ends_at_the_target_perplexity(one: dict[str, Any]) -> None:
    found = case(one, "target_perplexity")
    assert found["step"] == 6
    assert "7.389 reached 8" in found["reason"]


def test_bad_updates_in_a_row_end_the_run_and_name_the_batches(one: dict[str, Any]) -> None:
    found = case(one, "divergence")
    assert found["code"] == 4
    assert "batches 0 to 2" in found["message"]


def test_retention_keeps_last_best_and_multiples(one: dict[str, Any]) -> None:
    assert case(one, "retention") == [6, 8, 16, 18, 20]


def test_a_profiler_trace_of_the_steps_asked_for(one: dict[str, Any]) -> None:
    assert case(one, "profiler") == ["steps-3-4.rank0.json"]


def test_every_third_save_is_copied_and_the_copy_is_a_run(one: dict[str, Any]) -> None:
    found = case(one, "mirror")
    assert found["copies"] == ["step-6.f1", "step-3.f1"]
    assert found["lines"] == [f"[DRIVE BACKUP] Checkpoint #{n} -> {found['root']}/step-{n}.f1" for n in (3, 6)]
    assert found["resumed"] == [6, 6]
    assert found["sources"] == [6]


def test_saves_that_are_not_due_do_not_count_for_the_mirror(one: dict[str, Any]) -> None:
    found = case(one, "mirror")
    assert found["saves"] == [[0, False], [1, True], [1, False], [2, True], [2, False]]
    assert found["last"] == 3  # the last one is due as well
    assert found["cadence"] == [4]


def test_a_mirror_that_fails_is_in_the_status_and_stops_nothing(one: dict[str, Any]) -> None:
    found = case(one, "mirror")
    assert found["step"] == 6
    assert re.match(r"checkpoint.mirror: the last [45] copies failed \(.*Not a directory", found["message"])


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(one: dict[str, Any]) -> None:
    found = case(one, "walk_back")
    assert found["begin"] == 4
    (line,) = found["lines"]
    assert "step-6.f1 is passed over" in line
    assert "extra.safetensors: does not have the bytes" in line
    assert found["parts"] == found["whole"]
    assert found["names"] == ["step-8.f2", "step-6.f2", "step-4.f1", "step-2.f1"]


def test_where_no_checkpoint_is_whole_nothing_is_started(one: dict[str, Any]) -> None:
    found = case(one, "walk_back")
    code, message = found["outcome"]
    assert code == 3
    assert "none of 4 checkpoints is whole" in message
    assert "step-8.f2/state.json: is missing" in message
    assert found["state"] == "corrupt"
    assert found["left"] == found["names"]


def test_a_loss_spike_is_kept_out_of_the_weights_in_every_stage(one: dict[str, Any]) -> None:
    for stage in "0123":
        found = case(one, "spikes")[stage]
        assert found["moved"] == 0.0, stage
        assert 0.0 < found["after"] < 0.01, stage
        assert (found["step"], found["k"]) == (41, 42)
        assert found["skipped"] == found["spikes"] == [40]
        (line,) = [line for line in found["lines"] if "skipped" in line]
        assert "batch 40 skipped: step 40: loss" in line
        assert "samples 320 to 327" in line


def test_a_loss_spike_is_only_told_of_by_default(one: dict[str, Any]) -> None:
    found = case(one, "spikes")["warn"]
    assert found["moved"] > 0.0
    assert (found["step"], found["k"], found["skipped"]) == (42, 42, [])
    assert any("deviations above its running median" in line for line in found["lines"])


def test_what_changes_right_after_a_save_is_not_lost(one: dict[str, Any]) -> None:
    assert case(one, "changed_at_the_same_step") == {"before": [4], "after": [4], "lr": 1e-5, "step": 4}


def test_the_row_after_a_skipped_update_is_finite(one: dict[str, Any]) -> None:
    found = case(one, "skipped_rows")
    assert (found["k"], found["step"]) == (3, 2)
    assert found["losses"][0] is not None
    assert found["losses"][-1] is not None


def test_a_metric_that_no_evaluation_gives_is_refused(one: dict[str, Any]) -> None:
    message = case(one, "misspelt_metric")
    assert message.startswith("eval.metric: no evaluation gives val/lss")
    assert "val/loss" in message
