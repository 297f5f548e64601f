"""Presets for tests that walk all of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from pretrain.config.load import load_run_config
from pretrain.config.presets import list_presets
from pretrain.config.run import RunConfig


@cache
def _configs() -> dict[str, RunConfig]:
    return {name: load_run_config(name).config for name in list_presets()}


def presets(trained: bool = False) -> list[Any]:
    """Names of all presets, as parameters. All but the first two of a family and objective are marked slow.

    `trained` leaves out those in which nothing is trained: they run forward only, whatever the batch.
    """
    found, seen = [], dict[tuple[str, str], int]()
    for name, config in _configs().items():
        if trained and not config.model.parameter_count().trainable:
            continue
        kind = config.model.family, config.objective.name
        seen[kind] = seen.get(kind, 0) + 1
        found.append(pytest.param(name, marks=() if seen[kind] <= 2 else pytest.mark.slow))
    return found
