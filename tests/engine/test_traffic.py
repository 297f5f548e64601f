"""The bytes in the estimate of a step are those that DeepSpeed's collectives move, counted on two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.traffic_cases import CASES
from tests.engine.world import case, launch_cases

pytestmark = [pytest.mark.slow, pytest.mark.launch]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch_cases("tests.engine.traffic_cases", 2, tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("name", [name for name in CASES if "beyond" not in name])
def test_a_step_sends_what_the_formula_says(name: str, results: dict[str, Any]) -> None:
    """Within 1%: tensors are padded, and norms and flags are summed too."""
    found, expected = case(results, name)["counted"], case(results, name)["expected"]
    gradients = found.get("reduce_scatter_tensor" if "stage 3" in name else "all_reduce", 0.0)
    assert gradients == pytest.approx(expected["gradients"], rel=0.01)
    assert found.get("all_gather_into_tensor", 0.0) == pytest.approx(expected.get("weights", 0.0), rel=0.01)


def test_weights_that_do_not_stay_gathered_are_sent_twice(results: dict[str, Any]) -> None:
    found = case(results, "stage 3 beyond what stays gathered")
    assert found["counted"]["all_gather_into_tensor"] == pytest.approx(2 * found["expected"]["weights"], rel=0.01)
