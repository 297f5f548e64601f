"""The machine that the others wait for stands first, and is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from slurm.stragglers import by_machine, read_times


def times(node: str, *, data: float = 1.0, forward: float = 4.0, shared: float = 10.0,
          step: int = 110) -> dict[str, Any]:
    return {"node": node, "step": step, "seconds": {"data": data, "forward": forward, "backward": shared, "step": 0.0}}


def test_a_machine_with_one_slow_rank_is_a_straggler() -> None:
    rows = [times(node) for node in ("n1", "n1", "n2", "n2", "n3")] + [times("n3", data=9.0, shared=2.0)]
    found = by_machine(rows, first_step=10)
    assert [(machine.node, machine.straggles) for machine in found] == [("n3", True), ("n1", False), ("n2", False)]
    slow = found[0]
    assert (slow.ranks, slow.data, slow.forward, slow.shared) == (2, 0.09, 0.04, 0.02)
    assert slow.over_median == pytest.approx(13 / 5)


def test_ranks_that_have_made_no_step_are_left_out() -> None:
    assert by_machine([times("n1", step=10)], first_step=10) == []
    assert by_machine([], first_step=0) == []


def test_only_the_newest_start_is_read_and_torn_files_are_passed_over(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    lease = Lease.acquire(folder)
    beats = folder.heartbeat_dir(lease.fence)
    beats.mkdir(parents=True)
    (beats / "times-0.json").write_text(json.dumps(times("n1")))
    (beats / "times-1.json").write_text('{"node"')
    assert [row["node"] for row in read_times(folder)] == ["n1"]
    lease.release()
    Lease.acquire(folder)
    assert read_times(folder) == []
