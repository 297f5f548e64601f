"""The launches that all engine tests share: one start of 4 ranks, one of 1, one of 2; three more in the slow suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.world import launch_cases


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all launches: a later one resumes what an earlier one saved."""
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="session")
def four(base: Path) -> dict[str, Any]:
    return launch_cases("tests.engine.four_ranks", 4, base / "four_ranks")


@pytest.fixture(scope="session")
def one(base: Path, four: dict[str, Any]) -> dict[str, Any]:
    return launch_cases("tests.engine.one_rank", 1, base / "one_rank")


@pytest.fixture(scope="session")
def two(base: Path, one: dict[str, Any]) -> dict[str, Any]:
    return launch_cases("tests.engine.two_ranks", 2, base / "two_ranks")


@pytest.fixture(scope="session")
def alone(base: Path) -> dict[str, Any]:
    return launch_cases("tests.engine.alone", 1, base / "alone")


@pytest.fixture(params=[pytest.param("alone", marks=pytest.mark.slow), "two"], ids=["1 rank", "2 ranks"])
def small(request: pytest.FixtureRequest) -> dict[str, Any]:
    results: dict[str, Any] = request.getfixturevalue(request.param)
    return results


@pytest.fixture(scope="session")
def accidents(base: Path) -> dict[str, Any]:
    return launch_cases("tests.engine.accidents", 2, base / "accidents")


@pytest.fixture(params=["alone", "accidents"], ids=["1 rank", "2 ranks"])
def disturbed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Results of what goes wrong in a run, for tests that are slow."""
    results: dict[str, Any] = request.getfixturevalue(request.param)
    return results


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def families(request: pytest.FixtureRequest, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of the families' cases on one rank, and on several."""
    if request.param == 2:
        return request.getfixturevalue("one"), request.getfixturevalue("two")
    return request.getfixturevalue("alone"), request.getfixturevalue("families_on_four")


@pytest.fixture(scope="session")
def families_on_four(base: Path) -> dict[str, Any]:
    return launch_cases("tests.engine.families", 4, base / "families-4")
