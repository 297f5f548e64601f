"""AFRB's parts over several ranks: the same figures whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.world import case

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]  # the first test of a chain pays for three launches


@pytest.mark.parametrize("form", ["token", "channel", "token and channel"])
def test_a_recurrence_over_ranks_equals_one_rank(one: dict[str, Any], two: dict[str, Any], four: dict[str, Any],
                                                 form: str) -> None:
    alone = case(one, "sequence_parallel")[form]
    for several in (two, four):
        for want, got in zip(alone, case(several, "sequence_parallel")[form], strict=True):
            assert got == pytest.approx(want, rel=1e-12, abs=1e-12)
