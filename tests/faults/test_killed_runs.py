"""A run of two ranks, killed at any point of the engine, ends where it would have ended: to the last bit."""

from __future__ import annotations

import signal

import pytest

from tests.faults.harness import Case, Outcome
from tests.faults.inject import Point, Victim
from tests.faults.points import ALL, BY_NAME

pytestmark = pytest.mark.slow
OTHERS: tuple[Victim, Victim] = ("all", "launcher")
"""In turn: on the disk they leave the same, so that each point need not be met by both."""
CASES: list[tuple[Point, Victim]] = [(point, victim) for number, point in enumerate(ALL)
                                     for victim in ("rank", OTHERS[number % 2])]


@pytest.mark.parametrize("point, victim", CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_same_command_ends_with_the_same_bits(point: Point, victim: Victim, case: Case,
                                                  undisturbed: Outcome) -> None:
    if point.first:
        case.hit(BY_NAME[point.first], victim)
    code = case.hit(point, victim).code
    assert code == (-signal.SIGKILL if victim == "launcher" else 1)
    assert case.newest() in point.newest
    case.finish()
    assert case.outcome() == undisturbed
    assert case.mirrored()[0] == 12


def test_the_command_of_a_finished_run_changes_nothing(case: Case, undisturbed: Outcome) -> None:
    case.hit(BY_NAME["before the verdict"], "rank")
    for _ in range(2):
        assert "nothing to do" in case.finish().stderr
        assert case.outcome() == undisturbed
