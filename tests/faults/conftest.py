"""One undisturbed run of two ranks, and a folder in which the same command is given and killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.faults.harness", "tests.cli.tiny_run")

from tests.cli.tiny_run import make_dataset  # noqa: E402
from tests.cli.warm import Warm  # noqa: E402
from tests.faults.harness import Case, Outcome, new_case  # noqa: E402


@pytest.fixture(scope="session")
def fault_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset; nobody changes it."""
    return make_dataset(tmp_path_factory.mktemp("fault-data"))


@pytest.fixture(scope="session")
def forking() -> Iterator[Warm]:
    """The process that forks launchers and ranks."""
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(forking: Warm, fault_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the run ends with where nothing happens to it."""
    case = new_case(forking, fault_dataset, tmp_path_factory.mktemp("undisturbed"))
    case.finish()
    assert case.mirrored()[0] == 12
    return case.outcome()


@pytest.fixture
def case(forking: Warm, fault_dataset: Path, tmp_path: Path) -> Case:
    """The same run, not started yet."""
    return new_case(forking, fault_dataset, tmp_path)
