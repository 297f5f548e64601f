"""A run that goes on with another world or stage and is killed on the way ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.warm import Warm
from tests.faults.harness import Case, Outcome, new_case
from tests.faults.inject import Point, Victim
from tests.faults.points import BY_NAME

pytestmark = pytest.mark.slow
CHANGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "2 ranks, stage 2 to 1 rank, stage 3": ((), ("launch.nproc=1", "engine.zero_stage=3")),
    "1 rank, stage 0 to 2 ranks, stage 1": (("launch.nproc=1", "engine.zero_stage=0"), ("engine.zero_stage=1",)),
    "2 ranks, stage 3 to stage 2": (("engine.zero_stage=3",), ("engine.zero_stage=2",)),
}
POINTS: list[tuple[Point, Victim]] = [
    (Point("while weights are taken over", "pretrain.engine.shards:Shards.copy", "before", nth=20), "rank"),
    (Point("before the new start counts", "pretrain.runfolder.lease:Lease.set_resumed_from", "before"), "launcher"),
    (Point("in its first save", "torch:save", "half", match=r"f2-step-9/.*optim_states"), "all"),
    (Point("after its first save", "os:rename", "after", match=r"f2-step-9 ", newest=(9,)), "rank"),
]


@pytest.fixture(scope="module", params=CHANGES, ids=str)
def change(request: pytest.FixtureRequest, forking: Warm, fault_dataset: Path,
           tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Outcome]:
    """A run whose newest checkpoint is of step 6, to be gone on with in another world; and what that ends with."""
    first, second = CHANGES[request.param]
    started = new_case(forking, fault_dataset, tmp_path_factory.mktemp("started"))
    started.hit(BY_NAME["before the rename"], "rank", *first)
    assert started.newest() == 6
    started.sets = second
    whole = started.copied_to(tmp_path_factory.mktemp("whole"))
    assert "taken over at" in whole.finish().stderr
    return started, whole.outcome()


@pytest.mark.parametrize("point, victim", POINTS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_killed_conversion_ends_with_the_same_bits(point: Point, victim: Victim, change: tuple[Case, Outcome],
                                                     tmp_path: Path) -> None:
    case = change[0].copied_to(tmp_path)
    case.hit(point, victim)
    assert case.newest() in point.newest
    case.finish()
    assert case.outcome() == change[1]
