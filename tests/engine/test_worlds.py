"""What must hold whatever the number of ranks, the ZeRO stage and the way the batch is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import elastic_cases, elastic_checks
from tests.engine.world import case

STAGES = ("0", "1", "2", "3")
GOLDEN = Path(__file__).parent / "golden.json"
pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]  # the first test of a chain pays for three launches


def test_every_stage_equals_a_bare_pytorch_loop(one: dict[str, Any]) -> None:
    bare = case(one, "bare_loop")
    for stage in STAGES:
        assert case(one, "splits")[stage] == pytest.approx(bare, rel=1e-6), stage


@pytest.mark.parametrize("name", ["splits", "contrastive"])
def test_losses_do_not_depend_on_how_the_global_batch_is_split(
        name: str, one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]) -> None:
    reference = case(one, name)["0"]
    for world, results in ((1, one), (2, two), (4, four)):
        for stage, losses in case(results, name).items():
            assert len(losses) == 20
            assert losses == pytest.approx(reference, rel=1e-6), f"world {world}, stage {stage}"


def test_bf16_losses_stay_within_tolerance_of_each_other_and_of_fp32(one: dict[str, Any], two: dict[str, Any]) -> None:
    # bf16 keeps 8 bits of mantissa: a weight is off by up to 2^-9 of itself; losses here differ by about 1e-4 of it.
    fp32 = case(one, "splits")["2"]
    for results in (one, two):
        for losses in case(results, "bf16").values():
            assert losses == pytest.approx(fp32, rel=5e-4)
    assert case(one, "bf16")["2"] == pytest.approx(case(two, "bf16")["2"], rel=2e-4)


@pytest.mark.parametrize("key", ["0-fp32", "1-fp32", "2-fp32", "3-fp32", "2-bf16", "3-bf16"])
def test_two_restarts_change_no_bit(small: dict[str, Any], key: str) -> None:
    found = case(small, "resume")[key]
    assert found["last_start"] == 13
    assert found["parts"] == found["whole"]
    assert found["calls"] == 20


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(small: dict[str, Any], stage: str) -> None:
    found = case(small, "not_finite")[stage]
    saved = found.pop("saved")
    kept, explained = found.pop("kept"), found.pop("explained")
    assert found == {"step": 6, "k": 8, "moved": [0.0, 0.0], "skipped": [3, 4], "finite": True}
    ranks = [int(name.split("-")[-1].removesuffix(".safetensors")) for name in kept]
    assert kept == sorted(f"batch-{k}-rank-{rank}.safetensors" for k in (3, 4) for rank in range(max(ranks) + 1))
    assert explained == [f"[NaN DEBUG] batch {k}: weights and outputs of all modules are finite on every rank: the "
                         "loss or its gradient is not" for k in (3, 4)]
    assert saved["error"].startswith("step 6: not finite: ")
    assert saved["new"] == saved["left"] == []


@pytest.mark.parametrize("stage", ["2", "3"])
def test_frozen_weights_and_fp32_buffers_survive_bf16_and_a_restart(small: dict[str, Any], stage: str) -> None:
    found = case(small, "frozen_and_buffers")[stage]
    assert found["buffer_dtype"] == "torch.float32"
    assert found["buffer_exact"]
    assert found["frozen"] == 0.125
    assert found["resumed_at"] == 3
    assert found["problems"] == 0


def test_a_hook_writes_master_and_model_copy(small: dict[str, Any]) -> None:
    for key, found in case(small, "read_write").items():
        assert found["master"] == pytest.approx([0.3, 0.3], rel=1e-7), key
        assert found["used"] == pytest.approx([0.3, 0.3], rel=1e-7 if "fp32" in key else 2**-8), key


def test_matrices_without_a_gradient_are_seen_in_every_stage(small: dict[str, Any]) -> None:
    for key, found in case(small, "dead_matrices").items():
        assert found == [None, 0.0, pytest.approx(1 / 3)], key


@pytest.mark.parametrize("chain", elastic_cases.CHAINS)
def test_another_world_and_stage_take_over_every_bit(chain: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """Saved by 4 ranks, resumed and saved again by 1, trained, then by 2: names, masters, moments, steps, the rest."""
    for results, case_name, before, after in ((one, "next_link", "step-10.f1", "step-10.f2"),
                                              (two, "last_link", "step-20.f2", "step-20.f3")):
        checkpoints = Path(case(results, case_name)[chain]["root"]) / "checkpoints"
        elastic_checks.assert_same_state(checkpoints / before, checkpoints / after)


@pytest.mark.parametrize("chain", elastic_cases.CHAINS)
def test_losses_and_states_go_on_as_undisturbed_on_other_worlds_and_stages(
        chain: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    model, precision, *_ = chain.split("-")
    whole = case(one, "undisturbed")[f"{model}-{precision}"]
    last = case(two, "last_link")[chain]
    assert last["begun"] == 20
    assert len(last["losses"]) == 30
    assert last["losses"] == pytest.approx(whole["losses"], rel=elastic_checks.LOSS_RTOL[precision])
    assert last["calls"] == (30 if model == "toy" else None)
    elastic_checks.assert_close_state(Path(whole["root"]) / "checkpoints" / "step-30.f1",
                                      Path(last["root"]) / "checkpoints" / "step-30.f3", precision)


@pytest.mark.parametrize("chain", elastic_cases.CHAINS)
def test_every_group_keeps_its_decay_and_every_state_its_own_step(
        chain: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    for link, steps in ((case(one, "next_link")[chain], 10), (case(two, "last_link")[chain], 20)):
        for facts in link["facts"]:
            assert facts["decay"] == [link["decay"], 0.0]
            assert set(facts["steps"]) == {steps}
            assert facts["distinct"] == len(facts["steps"])


def test_the_stored_figure_is_asked_for_to_the_bit_only_where_it_was_taken(one: dict[str, Any]) -> None:
    said = case(one, "proof")
    assert said["here"].startswith("DataCorruption")
    assert said["elsewhere"] == ""
    assert said["elsewhere, other weights"].startswith("DataCorruption")


def test_a_resume_that_breaks_off_on_one_rank_leaves_the_checkpoint_as_it_was(two: dict[str, Any]) -> None:
    found = case(two, "interrupted")
    assert len(found["messages"]) == 2 and all("planted" in message for message in found["messages"])
    assert found["untouched"]
    assert found["step"] == 10


def test_evaluation_leaves_training_bit_identical(one: dict[str, Any]) -> None:
    found = case(one, "evaluation_changes_nothing")
    assert found["evaluated"] == found["plain"]
    assert not found["grads"]
    assert found["best"]


def test_golden_curve(one: dict[str, Any]) -> None:
    """100 losses at full precision. To move the curve, run `python -m tests.engine.renew_golden` and say why."""
    stored = json.loads(GOLDEN.read_text())
    losses = case(one, "golden")
    if stored["key"] == golden_key():
        assert losses == stored["losses"]
    else:
        assert losses == pytest.approx(stored["losses"], rel=1e-5)


def golden_key() -> list[str]:
    """Bits are promised only for the same torch on the same kind of CPU."""
    return [torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()]
