"""What is said of ranks that cannot train together, or do not reach each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.engine.preflight import Peer, misfit, rank_table, slow_line
from tests.engine.world import ROOT

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}
RANK = """
import json, os, signal, sys, time
import torch.distributed as dist
from pretrain.engine import distributed
from pretrain.engine.preflight import Peer
from pretrain.engine.ranks import rank_environment, meet
from pretrain.errors import PretrainError
from pathlib import Path
own = meet(rank_environment(os.environ), Path("meeting"), os.environ, timeout_s=30)
exec(os.environ["BEFORE"])
try:
    world = distributed.join(own, timeout_s=60, preflight_s=float(os.environ["LIMIT"]))
except PretrainError as error:
    print("error:", error, error.agreed, file=sys.stderr)
    os._exit(int(error.code))
total = world.reduce_ints([world.rank + 1])[0]
print(json.dumps([total, [peer.node for peer in world.peers]]))
distributed.shutdown(0, world)
"""


def peers(count: int = 4, **changes: object) -> list[Peer]:
    """Ranks, two a machine, each with a GPU of its own; `changes` are of rank 3."""
    made = [Peer(rank, rank % 2, f"n{1 + rank // 2}", 100 + rank, "H100", f"GPU-{rank}", VERSIONS)
            for rank in range(count)]
    last = made[-1]
    fields = {name: getattr(last, name) for name in last.__slots__}
    return [*made[:-1], Peer(**{**fields, **changes})]


def test_ranks_that_fit_are_shown_by_machine() -> None:
    assert misfit(peers()) is None
    assert rank_table(peers(device="H200")) == ["n1: rank 0-1, 2 x H100", "n2: rank 2-3, 1 x H100, 1 x H200",
                                                "python 3.11.7, torch 2.13.0, deepspeed 0.19.8"]


def test_a_version_that_differs_is_named_with_its_machines() -> None:
    other = misfit(peers(versions={**VERSIONS, "torch": "2.12.1"}))
    assert other == ("torch differs between ranks: 2.13.0 on rank 0-2 (n1, n2), 2.12.1 on rank 3 (n2); all machines "
                     "must use one environment")
    missing = misfit(peers(versions={k: v for k, v in VERSIONS.items() if k != "deepspeed"}))
    assert missing is not None
    assert "deepspeed differs between ranks: 0.19.8 on rank 0-2 (n1, n2), none on rank 3 (n2)" in missing


def test_two_ranks_on_one_gpu_are_named() -> None:
    assert misfit(peers(device_id="GPU-2")) == ("ranks 2 and 3 both use GPU GPU-2 of n2; one rank a GPU would be right")
    assert misfit(peers(device_id="GPU-1")) is None  # the same id on another machine is another device
    assert misfit([Peer(rank, rank, "n1", rank, "cpu", "", VERSIONS) for rank in range(4)]) is None


def test_a_slow_first_collective_names_who_did_not_come_else_who_did_not_get_through() -> None:
    assert "rank 2-3 (n2) did not come to it" in slow_line(peers(), {0, 1}, {0}, 5)
    line = slow_line(peers(), {0, 1, 2, 3}, {0, 1}, 5)
    assert "did not end within 5 s (launch.preflight): all began it, rank 2-3 (n2) did not get through" in line
    assert "GLOO_SOCKET_IFNAME" in line


def two_tasks(folder: Path, before: str, limit: float = 60.0) -> list[tuple[int, str, str]]:
    """(code, output, errors) of two ranks that were started as srun starts them."""
    started = []
    for rank in range(2):
        environment = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
                       "SLURM_STEP_NODELIST": "localhost,other", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0",
                       "SLURMD_NODENAME": ("localhost", "other")[rank], "BEFORE": before, "LIMIT": str(limit),
                       "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, "-P", "-c", RANK], cwd=folder, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    told = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=100)
            told.append((process.returncode, output, errors))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return told


@pytest.mark.slow
@pytest.mark.launch
def test_tasks_of_srun_meet_without_a_port_being_given(tmp_path: Path) -> None:
    for code, output, errors in two_tasks(tmp_path, ""):
        assert (code, errors) == (0, "")
        assert json.loads(output) == [3, ["localhost", "other"]]


@pytest.mark.slow
@pytest.mark.launch
def test_an_environment_of_other_versions_ends_the_start_on_all_ranks_with_one_line(tmp_path: Path) -> None:
    before = """
if own.rank == 1:
    current = Peer.current
    def older(own, device):
        peer = current(own, device)
        peer.versions["torch"] = "2.12.1"
        return peer
    Peer.current = older
"""
    for code, _, errors in two_tasks(tmp_path, before):
        assert code == 2
        assert "torch differs between ranks" in errors
        assert "2.12.1 on rank 1 (other); all machines must use one environment True" in errors


@pytest.mark.slow
@pytest.mark.launch
def test_a_rank_that_stops_before_the_first_collective_is_named_within_the_limit(tmp_path: Path) -> None:
    before = """
if own.rank == 1:
    from pretrain.engine import preflight
    distributed.first_collective = lambda *a: time.sleep(30)
"""
    (code, _, errors), _ = two_tasks(tmp_path, before, limit=2.0)
    assert code == 2
    assert "error: the first all-reduce of 2 ranks did not end within 2 s (launch.preflight): rank 1 (other) did not " \
        "come to it" in errors


@pytest.mark.slow
@pytest.mark.launch
def test_a_network_that_does_not_let_through_is_named_within_the_limit(tmp_path: Path) -> None:
    before = """
if own.rank == 1:
    distributed._add_ones = lambda *a: time.sleep(30)
"""
    found = two_tasks(tmp_path, before, limit=2.0)
    assert [code for code, _, _ in found] == [2, 2]
    told = "".join(errors for _, _, errors in found)
    assert told.count("error:") == 1
    assert "all began it, rank 0-1 (localhost, other) did not get through" in told
