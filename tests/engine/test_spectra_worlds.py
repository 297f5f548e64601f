"""Spectra in the engine: the same figures whatever the number of ranks, the ZeRO stage and the way memory is saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]  # the first test of a chain pays for three launches


def agree(found: dict[str, Any], want: dict[str, Any], rel: float, said: str) -> None:
    assert len(found["losses"]) == len(want["losses"]) == 4, said
    assert found["losses"] == pytest.approx(want["losses"], rel=rel), said
    assert found["norms"] == pytest.approx(want["norms"], rel=10 * rel), said


@pytest.mark.parametrize(("name", "rel"), [("spectra_contrastive", 1e-5), ("spectra_masked_lm", 1e-6)])
def test_losses_and_gradients_do_not_depend_on_ranks_and_stage(
        name: str, rel: float, families: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Every rank but the first holds positives whose place in the batch is not their place on the rank."""
    want = next(iter(case(families[0], name).values()))
    for said, results in zip(("one", "several"), families, strict=True):
        for stage in {"0", "2", "3"} & set(case(results, name)):
            agree(case(results, name)[stage], want, rel, f"{said}, stage {stage}")


def apart(found: dict[str, Any], want: dict[str, Any]) -> float:
    """Norm of the difference of the first update's whole gradients over the norm of the wanted one.

    Of each parameter by itself it is at most 1e-3, so that no scalar's error hides in the sum of all.
    """
    have, wanted = (load_file(each["gradients"]) for each in (found, want))
    assert have.keys() == wanted.keys()
    off = {name: float((have[name].double() - grad.double()).norm()) for name, grad in wanted.items()}
    own = {name: float(grad.double().norm()) for name, grad in wanted.items()}
    whole = math.hypot(*own.values())
    for name in off:
        assert off[name] <= 1e-3 * max(own[name], 1e-6 * whole), name
    return math.hypot(*off.values()) / whole


def test_every_gradient_is_that_of_the_whole_batch_on_one_rank(
        families: tuple[dict[str, Any], dict[str, Any]]) -> None:
    want = case(families[0], "spectra_contrastive")["0"]
    for said, results in zip(("one", "several"), families, strict=True):
        found = case(results, "spectra_contrastive")
        for name in {"0", "2", "3", "recomputed, uncached", "uncached, stage 3"} & set(found):
            assert apart(found[name], want) < 1e-5, f"{said}, {name}"


def test_several_contrastive_batches_an_update_are_the_same_on_any_ranks_and_stage(
        one: dict[str, Any], two: dict[str, Any]) -> None:
    """The published system: each is carried backward by itself, so that the reduction of an update is in parts."""
    want = case(one, "spectra_contrastive")["compat 0"]
    for said, results in (("one", one), ("two", two)):
        for stage in (0, 2, 3):
            found = case(results, "spectra_contrastive")[f"compat {stage}"]
            agree(found, want, 1e-5, f"{said}, stage {stage}")
            assert apart(found, want) < 1e-5, f"{said}, stage {stage}"


def test_one_pass_with_the_graphs_kept_changes_no_loss(small: dict[str, Any]) -> None:
    found = case(small, "spectra_contrastive")
    for name in ("recomputed, uncached", "uncached, stage 3"):
        agree(found[name], found["0"], 1e-5, name)


def test_weights_partitioned_as_they_are_built_begin_as_they_should(small: dict[str, Any]) -> None:
    found = case(small, "spectra_contrastive")["partitioned while built"]
    assert len(found["std"]) > 30 and len(found["losses"]) == 4
    for name, std in found["std"].items():
        small_output = "blocks" in name and name.endswith(("output.weight", "down.weight"))
        wanted = 0.02 if name.endswith("basis") else 0.88 * 0.02 / (2 if small_output else 1)  # sqrt(2 x 2 blocks)
        drawn = name.endswith(("weight", "basis")) and "norm." not in name
        assert std == (pytest.approx(wanted, rel=0.15) if drawn else 0.0), name
    assert found["gates"] == {"spectral.theta": [pytest.approx(-1.386294)], "attention.w_frac": [pytest.approx(0.02)]}


def test_every_term_is_reported(small: dict[str, Any]) -> None:
    last = case(small, "spectra_contrastive")["2"]["last"]
    terms = ("semantic", "anchor", "bridge", "fast", "ranking", "angular", "spectral", "entity")
    for name in (*(f"loss/{term}" for term in terms), "accuracy", "spectral/attn_entropy", "spectral/fusion",
                 "fractal/w_abs"):
        assert isinstance(last[name], float), name
    assert last["temperature"] == pytest.approx(0.0544, abs=1e-4)  # step 3 of 4


def test_an_encoder_without_these_heads_trains_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    agree(case(two, "spectra_baseline"), case(one, "spectra_baseline"), 1e-5, "two ranks")
    assert {"loss/nce", "accuracy"} <= set(case(one, "spectra_baseline")["last"])


@pytest.mark.parametrize("key", ["2-fp32", "3-bf16"])
def test_a_restart_changes_no_bit(small: dict[str, Any], key: str) -> None:
    found = case(small, "spectra_resume")[key]
    assert found["begin"] == 2 and len(found["whole"]) == 4
    assert found["parts"] == found["whole"]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_vector_that_is_not_finite_on_one_rank_skips_the_update_on_all(small: dict[str, Any], stage: str) -> None:
    found = case(small, "spectra_not_finite")[stage]
    assert [found["step"], found["moved"], found["skipped"]] == [2, [True, False, False, True], [1, 2]]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_vector_that_is_not_finite_is_told_of_by_its_module_and_its_batch_is_kept(small: dict[str, Any],
                                                                                     stage: str) -> None:
    found = case(small, "spectra_not_finite")[stage]
    last = found["ranks"] - 1
    assert found["explained"] == [f"[NaN DEBUG] batch {k}: rank {last}: heads.retrieval: output not finite, its inputs "
                                  "are" for k in (1, 2)]
    assert sorted(found["kept"]) == [f"batch-{k}-rank-{last}.safetensors" for k in (1, 2)]
    for k in (1, 2):
        batch = found["kept"][f"batch-{k}-rank-{last}.safetensors"]
        about = batch["about"]
        assert [about["k"], about["step"], about["rank"], about["module"]] == [k, 1, last, "heads.retrieval"]
        assert about["lr"] > 0 and about["terms"]["loss"] != about["terms"]["loss"]
        assert math.isfinite(about["terms"]["loss/semantic"])
        assert batch["as_fed"] and all(8 * k <= sample < 8 * (k + 1) for sample in batch["sample_ids"])
        assert batch["generator"] == torch.get_rng_state().numel()


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_trunk_is_taken_over_to_the_bit(small: dict[str, Any], stage: str) -> None:
    found = case(small, "spectra_masked_lm")[f"pupil {stage}"]
    assert found["largest"] == 0 and found["step"] == 0
    assert found["weights"] == 2 + 2 * (8 + 1 + 9 + 2 + 6 + 2) + 2  # tables, blocks, last norm
