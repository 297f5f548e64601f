"""What happens to jobs on real clusters, done to a real one. Each run ends by itself with the undisturbed result.

Two of four nodes are used where a node is lost, so that there is somewhere to go on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pretrain.monitor.rows import decode
from tests.slurm.cluster import (
    SLOW_STEPS,
    Cluster,
    Trial,
    assert_undisturbed,
    payload_config,
    submitted,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 150


def begun(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, *, beyond: int = 12, steps: int = STEPS,
          env: dict[str, str] | None = None, **slurm: object) -> Trial:
    """A job that trains and has saved its first checkpoint."""
    loaded = payload_config(folder, steps, env={**SLOW_STEPS, **(env or {})}, **{"nodes": 2, **slurm})
    trial = submitted(cluster, folder, loaded, monkeypatch)
    until(lambda: trial.step() > beyond)
    return trial


def assert_went_on(trial: Trial, restarts: int = 1, steps: int = STEPS) -> None:
    """It ended well, after so many restarts, each of which went on from a checkpoint."""
    job = trial.end(300)
    assert_undisturbed(trial, steps)
    assert job.restarts == restarts, trial.log()
    assert len(trial.history) == restarts + 1
    for start in trial.history[1:]:
        assert start.step > 0


def test_the_time_limit(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm itself sends the signal, some time between 50 s and 110 s after the start."""
    env = {"PAYLOAD_STEP_S": "0.5"}
    trial = begun(cluster, tmp_path, monkeypatch, steps=260, env=env, time="2:00", save_before=10)
    assert_went_on(trial, restarts=max(1, trial.end(600).restarts), steps=260)
    assert set(trial.reasons[:-1]) == {"time limit"}
    for start in trial.history[:-1]:
        assert start.ended is not None
        assert start.ended - start.begun < 180  # the limit and the time that ranks had to end
        assert start.saved == trial.history[trial.history.index(start) + 1].step


def test_a_preemption(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch, partition="low", nodes=4, exclusive=True)
    urgent = cluster.run("sbatch", "--parsable", "-p", "debug", "-N2", "--exclusive", "--output=/dev/null",
                         "--wrap=sleep 3").strip()
    cluster.wait(urgent, "COMPLETED")
    assert_went_on(trial)
    assert trial.reasons == ["preempted", "done"]
    assert trial.history[0].saved == trial.history[1].step > 12


def test_a_requeue_by_the_operator(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch)
    cluster.run("scontrol", "requeue", trial.number)
    assert_went_on(trial)
    assert trial.reasons == ["requeued by Slurm", "done"]
    assert trial.history[0].saved == trial.history[1].step > 12  # it saved on TERM


def test_a_node_that_crashes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch)
    cluster.break_down("crash", "n2")
    assert_went_on(trial, restarts=trial.end(300).restarts)
    assert trial.history[-1].nodes != "n[1-2]"
    assert "n2" not in trial.history[-1].nodes


def test_the_machine_of_the_batch_script_crashes(cluster: Cluster, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch)
    cluster.break_down("crash", "n1")
    assert_went_on(trial)
    assert trial.reasons == ["node failure: n1 (down*)", "done"]
    assert trial.history[1].nodes == "n[2-3]"


def test_a_rank_that_is_killed(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch)
    found = cluster.run("pgrep", "-f", str(trial.root / "slurm/config.yaml")).split()
    ranks = [int(pid) for pid in found if "SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    assert ranks
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert_went_on(trial)
    assert trial.history[0].action == "requeue"
    assert "lost its connection to another rank" in trial.reasons[0]


def test_a_task_that_outlives_its_slurmd_is_not_heard(cluster: Cluster, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start trains on beside the second one, never asks whether the run is still its own, and goes wrong."""
    trial = begun(cluster, tmp_path, monkeypatch, nodes=1, steps=700, env={"PAYLOAD_HAUNT": "1"})
    cluster.break_down("kill-slurmd", "n1")
    assert_went_on(trial, steps=700)
    taken_over_at = trial.history[1].step
    late = [ref.step for ref in trial.folder.published() if ref.fence == 1 and ref.step > taken_over_at]
    assert late, "the dead start has published nothing late: this test shows nothing"
    assert trial.history[1].nodes == "n2"
    assert {ref.fence for ref in trial.folder.checkpoints()} == {2}
    rows = [decode(line) for line in trial.folder.metrics_jsonl.read_bytes().splitlines()]
    assert [row for row in rows if row is not None and row["fence"] == 1 and int(row["step"] or 0) > taken_over_at]
    assert trial.reasons == ["node failure: n1 (down*)", "done"]


def test_a_controller_that_is_restarted(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch)
    cluster.break_down("restart-ctld")
    assert_went_on(trial, restarts=0)


def test_a_disk_that_is_full_while_saving(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, cluster.disk, monkeypatch, env={"PAYLOAD_BALLAST": "500000"})
    filler = cluster.disk / "filler"
    free = os.statvfs(cluster.disk)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 200_000))
    until(lambda: trial.history[0].ended)
    assert "is full" in trial.reasons[0]
    filler.unlink()
    assert_went_on(trial)


def test_two_nodes_that_are_gone_for_good(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = begun(cluster, tmp_path, monkeypatch, nodes=4, min_nodes=2)
    assert trial.history[0].nodes == "n[1-4]"
    for node in ("n3", "n4"):
        cluster.break_down("crash", node)
    assert_went_on(trial, restarts=trial.end(300).restarts)
    assert trial.history[-1].nodes == "n[1-2]"


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_whose_network_is_cut(node: str, wired: Cluster, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """n1 has rank 0 and the batch script, which go on writing to the run folder until they notice."""
    trial = begun(wired, tmp_path, monkeypatch, steps=300)
    wired.break_down("unplug", node)
    until(lambda: len(trial.history) == 2)
    wired.break_down("plug", node)
    assert_went_on(trial, restarts=trial.end(300).restarts, steps=300)
    assert node not in trial.history[1].nodes
