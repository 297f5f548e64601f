"""Every ZeRO stage to every other over 1 -> 2 -> 4 -> 1 ranks; a resume that is killed; its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import elastic_checks
from tests.engine.elastic_matrix import DOOMED, LEG_STEPS, LEGS, STAGES, carrier, pairs
from tests.engine.world import case, launch_cases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
MODULE = "tests.engine.elastic_matrix"
PAIRS = [(precision, saved, stage) for precision in STAGES for saved, stage in pairs(precision)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def legs(base: Path) -> list[dict[str, Any]]:
    """Results of the four legs; between the first two, a resume on two ranks is killed."""
    found = [launch_cases(MODULE, LEGS[0], base / "leg-0", timeout_s=600)]
    with pytest.raises(AssertionError, match=r"codes \[-9, -9\]"):
        launch_cases(MODULE, 2, base / "killed", timeout_s=120)
    for leg, world in list(enumerate(LEGS))[1:]:
        found.append(launch_cases(MODULE, world, base / f"leg-{leg}", timeout_s=900))
    return found


def origin_of(base: Path, leg: int, precision: str, saved: int) -> Path:
    """The checkpoint that leg `leg` took over: the first leg saved once, later ones at their start and at their end."""
    folder = base / f"leg-{leg - 1}" / ("first_leg" if leg == 1 else "next_leg") / "runs" / carrier(precision, saved)
    return folder / "checkpoints" / f"step-{LEG_STEPS * leg}.f{leg}"


@pytest.mark.parametrize("leg", [1, 2, 3])
@pytest.mark.parametrize(("precision", "saved", "stage"), PAIRS)
def test_every_stage_takes_over_every_bit_of_every_other(
        leg: int, precision: str, saved: int, stage: int, base: Path, legs: list[dict[str, Any]]) -> None:
    root = Path(case(legs[leg], "next_leg")[f"{precision}-{saved}-{stage}"]["root"])
    elastic_checks.assert_same_state(origin_of(base, leg, precision, saved),
                                     root / "checkpoints" / f"step-{LEG_STEPS * leg}.f{leg + 1}")


@pytest.mark.parametrize("leg", [1, 2, 3])
@pytest.mark.parametrize(("precision", "saved", "stage"), PAIRS)
def test_the_next_20_losses_are_those_of_the_undisturbed_run(
        leg: int, precision: str, saved: int, stage: int, legs: list[dict[str, Any]]) -> None:
    found = case(legs[leg], "next_leg")[f"{precision}-{saved}-{stage}"]
    whole = case(legs[0], "first_leg")[f"undisturbed-{precision}"]["losses"]
    end = LEG_STEPS * (leg + 1)
    assert found["begun"] == end - LEG_STEPS
    assert found["calls"] == len(found["losses"]) == end
    assert found["losses"] == pytest.approx(whole[:end], rel=elastic_checks.LOSS_RTOL[precision])
    for facts in found["facts"]:
        assert facts["decay"] == [found["decay"], 0.0]
        assert set(facts["steps"]) == {end - LEG_STEPS} and facts["distinct"] == len(facts["steps"])


@pytest.mark.parametrize(("precision", "saved", "stage"), PAIRS)
def test_after_all_worlds_the_state_is_that_of_the_undisturbed_run(
        precision: str, saved: int, stage: int, base: Path, legs: list[dict[str, Any]]) -> None:
    root = Path(case(legs[3], "next_leg")[f"{precision}-{saved}-{stage}"]["root"])
    whole = base / "leg-0" / "first_leg" / "runs" / f"undisturbed-{precision}" / "checkpoints"
    step = f"step-{LEG_STEPS * len(LEGS)}"
    elastic_checks.assert_close_state(whole / f"{step}.f1", root / "checkpoints" / f"{step}.f4", precision)


@pytest.mark.parametrize("stage", STAGES["bf16"])
def test_bf16_with_another_micro_batch_stays_within_tolerance(stage: int, legs: list[dict[str, Any]]) -> None:
    whole = case(legs[0], "first_leg")["undisturbed-bf16"]["losses"]
    losses = case(legs[3], "other_split")[f"bf16-{stage}"]["losses"]
    assert losses == pytest.approx(whole, rel=elastic_checks.LOSS_RTOL["bf16"])


@pytest.mark.parametrize("saved", ["bf16", "fp32"])
def test_another_precision_goes_on_near_the_former_one(saved: str, legs: list[dict[str, Any]]) -> None:
    whole = case(legs[0], "first_leg")[f"undisturbed-{saved}"]["losses"]
    assert case(legs[3], "other_precision")[saved]["losses"] == pytest.approx(whole, rel=5e-4)


def test_a_killed_resume_leaves_its_checkpoint_whole(base: Path, legs: list[dict[str, Any]]) -> None:
    checkpoints = base / "leg-0" / "first_leg" / "runs" / DOOMED / "checkpoints"
    elastic_checks.shards_of(checkpoints / "step-10.f1")
    found = case(legs[1], "after_kill")
    assert found["begun"] == 10
    whole = case(legs[0], "first_leg")["undisturbed-fp32"]["losses"]
    assert found["losses"] == pytest.approx(whole[:20], rel=elastic_checks.LOSS_RTOL["fp32"])


def test_a_load_takes_no_memory_beyond_the_engine(legs: list[dict[str, Any]]) -> None:
    """The state is 113 MB; half of it was written by each of two ranks."""
    for pair, over in case(legs[3], "memory").items():
        assert over < 4e6, pair
