"""How the tests are divided among the processes of `pytest -n`."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class _ByRoom(LoadScopeScheduling):
    """All tests of a room in one process: they share datasets, launches of several ranks and a warm server."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("/")[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByRoom:
    return _ByRoom(config, log)
