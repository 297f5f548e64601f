"""A tiny dataset and a warm process, once for all tests of the command line that train."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.tiny_run import make_dataset, write_config
from tests.cli.warm import Warm


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset; nobody changes it."""
    return make_dataset(tmp_path_factory.mktemp("tiny-data"))


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def folder(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A working folder with `tiny.yaml` and the dataset as `set`."""
    (tmp_path / "set").symlink_to(tiny_dataset)
    write_config(tmp_path)
    return tmp_path
