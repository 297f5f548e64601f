"""A short series of kills at random moments; `make faults` runs a long one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, Report
from tests.faults.engine_campaign import kill_engine

pytestmark = pytest.mark.slow
SEED = 1


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The killed processes are forks of this one, and would log into its output."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_run_without_torch_keeps_its_promises(tmp_path: Path) -> None:
    report = Campaign(tmp_path, SEED, Report()).run(15)
    assert report.violations == []
    assert report.kills >= 15
    assert report.lives >= 1


def test_the_engine_ends_with_the_bits_of_an_undisturbed_run(tmp_path: Path) -> None:
    report = kill_engine(tmp_path, SEED, 1)
    assert report.violations == []
    assert report.kills == 1
