"""A real cluster of four nodes, once for all tests that ask for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


def _running(mode: str) -> Iterator[Cluster]:
    reason = why_not(mode)
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster(mode)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def _hosts() -> Iterator[Cluster]:
    yield from _running("hosts")


@pytest.fixture(scope="module")
def _netns() -> Iterator[Cluster]:
    yield from _running("netns")


@pytest.fixture
def cluster(_hosts: Cluster) -> Iterator[Cluster]:
    """Nodes with names of their own on one network."""
    yield _hosts
    _hosts.settle()


@pytest.fixture
def wired(_netns: Cluster) -> Iterator[Cluster]:
    """Nodes with addresses of their own, whose cables can be pulled."""
    yield _netns
    _netns.settle()
