"""What the watch takes for a hang while a checkpoint is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.engine.watch import Place, Watch
from pretrain.runfolder.layout import RunFolder

LIMIT = 60.0
SAVING = Place(k=9, step=9, moves=50, phase="save")


class Ranks:
    """A watch of rank 0, and the signs of life of two ranks at a time of our own."""

    def __init__(self, folder: Path) -> None:
        root = RunFolder.create(folder)
        self.beats = root.heartbeat_dir(1)
        self.beats.mkdir(parents=True)
        self.watch = Watch(root, 1, 0, 2, LIMIT, lambda: SAVING)
        self.beat = 0

    def seen(self, now: float, *places: Place) -> str | None:
        """What the watch says once the ranks have been seen at `places`."""
        self.beat += 1
        for rank, place in enumerate(places):
            written = [self.beat, place.k, place.step, place.moves, place.phase, place.written]
            (self.beats / f"rank-{rank}.json").write_text(json.dumps(written))
        return self.watch._hang(now)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def at(written: int, *, ended: bool = False, phase: str = "save") -> Place:
    return Place(SAVING.k, SAVING.step, SAVING.moves + ended, phase, written)


def test_a_save_is_no_hang_as_long_as_a_disk_takes_it_in(ranks: Ranks) -> None:
    for minute in range(20):
        assert ranks.seen(60.0 * minute, at(3, ended=True), at(minute)) is None


def test_a_disk_that_takes_nothing_in_is_a_hang_of_the_rank_that_writes(ranks: Ranks) -> None:
    assert ranks.seen(0.0, at(3, ended=True), at(3)) is None
    assert ranks.seen(LIMIT - 1, at(3, ended=True), at(4)) is None
    assert ranks.seen(LIMIT + 1, at(3, ended=True), at(4)) is None
    line = ranks.seen(2 * LIMIT + 2, at(3, ended=True), at(4))
    assert line is not None
    assert line.startswith("rank 1 has made no progress for 63 s")
    assert "phase save" in line


def test_a_save_in_the_background_hides_no_hang_of_training(ranks: Ranks) -> None:
    for second in range(0, int(LIMIT), 10):
        assert ranks.seen(float(second), at(second, phase="backward"), at(second, ended=True, phase="backward")) is None
    line = ranks.seen(LIMIT + 1, at(90, phase="backward"), at(90, ended=True, phase="backward"))
    assert line is not None
    assert line.startswith("rank 0 has made no progress for 61 s")
