"""Who a process is, which machines a node list names, and how ranks of srun find one port. No torch, no Slurm."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.engine.ranks import LISTEN_FD, RankEnvironment, expand_nodes, forget_meeting, meet, rank_environment
from pretrain.errors import UserError

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]",
         "SLURM_STEP_NODELIST": "n[02-03]"}


def test_tasks_of_srun_are_ranks_and_one_task_is_a_process_of_its_own() -> None:
    assert rank_environment(SLURM) == RankEnvironment(3, 1, 4, "n02", 0)
    assert rank_environment({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "5"}) == RankEnvironment(3, 1, 4, "a", 5)
    assert rank_environment({**SLURM, "SLURM_STEP_NODELIST": ""}) == RankEnvironment(3, 1, 4, "n1", 0)
    assert rank_environment({**SLURM, "SLURM_NTASKS": "1"}) is None
    assert rank_environment({"SLURM_NTASKS": "4"}) is None  # an allocation without srun
    assert rank_environment({"WORLD_SIZE": "4", "MASTER_ADDR": "node0"}) is None


def test_a_launched_rank_inside_of_a_job_is_what_its_launcher_says() -> None:
    assert rank_environment({**SLURM, **LAUNCHED}) == RankEnvironment(1, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(("change", "message"), [
    ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
    ({"SLURM_NTASKS": "four"}, "SLURM_NTASKS is 'four'"),
    ({"SLURM_PROCID": "4"}, "SLURM_PROCID is 4, which is not below SLURM_NTASKS 4"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ({"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
    ({**LAUNCHED, "MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ({**LAUNCHED, "MASTER_PORT": None}, "MASTER_PORT is not set"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_half_set_environment_names_the_variable(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**SLURM, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        rank_environment(environment)


@pytest.mark.parametrize(("text", "names"), [
    ("n1", ["n1"]), ("n[1-3]", ["n1", "n2", "n3"]), ("n[1-2,7],gpu-a", ["n1", "n2", "n7", "gpu-a"]),
    ("n[08-11]", ["n08", "n09", "n10", "n11"]), ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ("a[1]b.c,d", ["a1b.c", "d"]), ("n[99-101]", ["n99", "n100", "n101"])])
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[", "n[1-", "n[a-b]", "n]1[", ",", "n[1-3],", "n[0-999999999]", "n[3-1]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_nodes(text)


@given(st.text(alphabet="n19[],-. a", max_size=20))
def test_any_text_is_a_list_of_names_or_refused(text: str) -> None:
    try:
        names = expand_nodes(text)
    except UserError:
        return
    assert names
    assert all(names)
    assert not set("".join(names)) & set("[],")


def ranks_of(folder: Path, environment: dict[str, str], timeout_s: float = 5.0, ranks: int = 3) -> dict[int, int]:
    """Port by rank, of ranks that meet at the same time; rank 0 comes last."""
    found: dict[int, int] = {}

    def come(rank: int) -> None:
        own = RankEnvironment(rank, 0, ranks, "n1", 0)
        found[rank] = meet(own, folder, environment, timeout_s=timeout_s).master_port
    others = [threading.Thread(target=come, args=(rank,)) for rank in range(1, ranks)]
    for thread in others:
        thread.start()
    time.sleep(0.1)
    come(0)
    for thread in others:
        thread.join()
    return found


@pytest.fixture
def listeners():
    """Sockets that rank 0 has left to be inherited."""
    taken: list[socket.socket] = []
    yield lambda: taken.append(socket.socket(fileno=int(os.environ.pop(LISTEN_FD)))) or taken[-1]
    for one in taken:
        one.close()


def test_jobs_that_meet_side_by_side_never_share_a_port(tmp_path: Path, listeners) -> None:
    ports = set()
    for restart in range(5):
        found = ranks_of(tmp_path / "meet", {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
                                             "SLURM_RESTART_COUNT": str(restart)})
        assert set(found) == {0, 1, 2}
        port, = set(found.values())
        assert port == listeners().getsockname()[1]
        ports.add(port)
    assert len(ports) == 5
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    forget_meeting(tmp_path / "meet")
    assert list((tmp_path / "meet").iterdir()) == []


def test_what_another_start_of_the_job_left_is_not_taken_for_ours(tmp_path: Path, listeners) -> None:
    first = ranks_of(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, ranks=2)
    second = ranks_of(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}, ranks=2)
    listeners()
    assert first[1] != second[1]


def test_a_rank_0_that_does_not_come_is_missed_in_one_line(tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    with pytest.raises(UserError, match="rank 0 did not come to n1 within 0 s") as caught:
        meet(RankEnvironment(1, 0, 3, "n1", 0), tmp_path, environment, timeout_s=0.2)
    assert not caught.value.agreed
    with pytest.raises(UserError) as caught:
        meet(RankEnvironment(2, 0, 3, "n1", 0), tmp_path, environment, timeout_s=0.0)
    assert caught.value.agreed  # and rank 2 leaves it to rank 1 to say so


def test_a_port_that_is_given_is_kept(tmp_path: Path) -> None:
    own = RankEnvironment(1, 0, 3, "n1", 29500)
    assert meet(own, tmp_path, {}, timeout_s=0.0) == own
