"""AFRB's parts over several ranks: the same figures whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]  # the first test of a chain pays for three launches


@pytest.mark.parametrize("form", ["token", "channel", "token and channel", "32768 tokens"])
def test_a_recurrence_over_ranks_equals_one_rank(families: tuple[dict[str, Any], dict[str, Any]], form: str) -> None:
    alone, several = (case(results, "sequence_parallel")[form] for results in families)
    allowed = 1e-10 if form == "32768 tokens" else 1e-12  # in fp64, of sums over thousands of tokens
    for want, got in zip(alone, several, strict=True):
        assert got == pytest.approx(want, rel=allowed, abs=allowed)


STAGES = ("vector 3", "matrix 0", "matrix 2", "matrix 3", "matrix checkpointing")


def test_losses_depend_neither_on_stage_nor_on_ranks(families: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Tables looked up by id, maps frozen by mask, scalars and tied tables: the same at ZeRO-0, 2, 3 and 1, 2, 4 ranks.

    Stage 3 keeps no weight between two uses, so one that is read outside of its module would be empty.
    """
    want = case(families[0], "afrb_needles")
    for results in families:
        found = case(results, "afrb_needles")
        for key in ("vector 0", *STAGES):
            assert found[key] == pytest.approx(want[f"{key.split()[0]} 0"], rel=1e-5), key
        assert found["matrix bf16"] == pytest.approx(want["matrix 0"], rel=2e-2)


def test_evaluations_are_the_same_on_any_number_of_ranks_and_begin_at_step_0(
        one: dict[str, Any], two: dict[str, Any]) -> None:
    want = case(one, "afrb_evaluated")["0"]
    assert want["steps"] == [0, 2, 4]
    assert {"val/needle_hit_rate", "val/needle_echo_rate", "val/phase_coherence", "val/loss"} <= set(want["rows"][0])
    for world in (one, two):
        for found in case(world, "afrb_evaluated").values():
            assert found["steps"] == [0, 2, 4]
            for row, other in zip(found["rows"], want["rows"], strict=True):
                assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_the_readout_map_is_fitted_once_and_frozen_as_long_as_asked(small: dict[str, Any]) -> None:
    for found in case(small, "afrb_frozen_map").values():
        assert found["moved"] == [False, False, True] and found["same"] and found["calibrated"] == 1.0
    stages = case(small, "afrb_frozen_map")
    assert stages["0"]["losses"] == pytest.approx(case(small, "afrb_needles")["vector 0"], rel=1e-6)
    assert stages["3"]["losses"] == pytest.approx(stages["0"]["losses"], rel=1e-5)


def test_weights_partitioned_as_they_are_built_are_whole_for_what_comes_before_the_first_step(
        small: dict[str, Any]) -> None:
    found = case(small, "afrb_built_in_parts")
    assert all(each["parts"] for each in found.values()) and all(len(each["losses"]) == 4 for each in found.values())
    assert found["matrix"]["orthogonal"] < 1e-4 and found["matrix"]["whitened"] > 0.1
    assert found["matrix"]["scale"] >= 10 and found["vector"]["spread"] > 1e-3


def test_a_new_run_from_weights_is_of_their_model_but_for_what_its_config_says(two: dict[str, Any]) -> None:
    """Blocks, memory and the calibrated map come along, step and optimizer do not; other shapes are refused."""
    found = case(two, "afrb_finetuned")
    bare, otherwise, less = found["bare"], found["otherwise"], found["less"]
    assert (bare["blocks"], bare["alpha"], bare["pvm"], bare["step"], bare["equal"]) == (2, 0.04, True, 0, True)
    assert len(bare["losses"]) == 2 and not any(line.startswith("WARNING") for line in bare["said"])
    told = next(line for line in bare["said"] if "as in" in line)
    assert "model.n_afrb 2" in told and "model.enable_pvm true" in told
    assert (otherwise["blocks"], otherwise["alpha"], otherwise["equal"]) == (2, 0.5, True)
    warned = next(line for line in otherwise["said"] if line.startswith("WARNING"))
    assert "model.alpha is 0.04 there, 0.5 here" in warned and "n_afrb" not in warned
    assert not less["pvm"] and less["equal"], "what is left out on purpose is left out"
    warned = " ".join(line for line in less["said"] if line.startswith("WARNING"))
    assert "model.enable_pvm is true there, false here" in warned and "no place for" in warned
    assert "train.init_from" in found["misfit"] and "of another model" in found["misfit"]
