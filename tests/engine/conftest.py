"""The launches that all engine tests share: one start of 4 ranks, one of 1, one of 2."""

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


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def small(request: pytest.FixtureRequest, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    return one if request.param == 1 else two
