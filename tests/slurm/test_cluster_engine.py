"""The real engine on four nodes: DeepSpeed under srun, interrupted and broken, against a local run of one batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.load import LoadedConfig
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest
from pretrain.runfolder.status import Status
from slurm.stragglers import by_machine, read_times
from tests.slurm.cluster import ROOT, Cluster, Trial, payload_config, submitted, until

pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(900)]
STEPS = 160


def config(folder: Path, **slurm: object) -> LoadedConfig:
    return payload_config(folder, STEPS, every=20, env={"TOKENIZERS_PARALLELISM": "false"}, **{"grace": 20, **slurm})


def losses(root: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row that counts."""
    return [(int(row["step"] or 0), float(row["loss"])) for row in read_metrics(RunFolder(root))  # type: ignore[arg-type]
            if row.get("loss") is not None]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of the same config, trained by four processes of one machine."""
    folder = tmp_path_factory.mktemp("local")
    config(folder)
    done = subprocess.run([sys.executable, "-P", "-m", "pretrain.cli.main", "train", "run.yaml", "--nproc", "4"],
                          cwd=folder, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = losses(folder / "runs/run")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


def assert_same(trial: Trial, local: list[tuple[int, float]]) -> None:
    """It ended well, with the very losses of the local run and whole checkpoints."""
    trial.end(300)
    assert losses(trial.root) == local, trial.log()[-3000:]
    status = Status.read(trial.folder)
    assert status is not None
    assert (status.state, status.step) == ("done", STEPS)
    assert trial.folder.checkpoints()[0].step == STEPS
    for ref in trial.folder.checkpoints():
        assert Manifest.read(ref.path).verify(ref.path) == []


def test_four_nodes_train_as_four_local_processes_do(cluster: Cluster, tmp_path: Path, local: list[tuple[int, float]],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, config(tmp_path), monkeypatch, payload=False)
    assert_same(trial, local)
    log = (trial.root / "train.log").read_text()
    for number in range(4):
        assert f"n{number + 1}: rank {number}, 1 x cpu" in log
    assert list((trial.root / "slurm/meeting").iterdir()) == []


SLOW_LOADER = """
import os, runpy, sys, time
from pretrain.data.loader import UpdateLoader
if os.environ.get("SLURMD_NODENAME") == "n2":
    read = UpdateLoader.__next__
    def slowly(loader):
        time.sleep(0.3)
        return read(loader)
    UpdateLoader.__next__ = slowly
sys.argv = ["pretrain", "train", sys.argv[1]]
runpy.run_module("pretrain.cli.main", run_name="__main__")
"""


def test_a_machine_with_a_slow_loader_is_found(cluster: Cluster, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(SLOW_LOADER)
    loaded = payload_config(tmp_path, 400, every=1000, nodes=3)
    values = loaded.config.model_copy(update={"launch": loaded.config.launch.model_copy(update={"hang_timeout": 20.0})})
    loaded = LoadedConfig(values, {**loaded.values, "launch": {**loaded.values["launch"], "hang_timeout": 20.0}},
                          loaded.origins)
    command = [str(tmp_path / "slow.py"), str(tmp_path / "runs/run/slurm/config.yaml")]
    trial = submitted(cluster, tmp_path, loaded, monkeypatch, command=command)
    until(lambda: trial.step() >= 20 and len(read_times(trial.folder)) == 3, 150)
    found = by_machine(read_times(trial.folder), 0)
    assert [machine.node for machine in found if machine.straggles] == ["n2"]
    assert found[0].data > 0.25
    assert max(machine.data for machine in found[1:]) < 0.1


def test_torchrun_on_each_machine(cluster: Cluster, tmp_path: Path, local: list[tuple[int, float]],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are asked through the run folder, because it would die of the signal; the verdict is in the status."""
    loaded = config(tmp_path, launcher="torchrun", nodes=2, tasks_per_node=2)
    trial = submitted(cluster, tmp_path, loaded, monkeypatch, payload=False)
    until(lambda: trial.step() >= 45, 200)
    cluster.run("scancel", "--signal=USR1", "--batch", trial.number)
    assert_same(trial, local)
    assert trial.reasons[-1] == "done"
    assert trial.history[0].action == "requeue"
    assert trial.history[1].step >= 45


def test_two_signals_and_two_requeues(cluster: Cluster, tmp_path: Path, local: list[tuple[int, float]],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, config(tmp_path), monkeypatch, payload=False)
    for restart in range(2):
        until(lambda restart=restart: len(trial.history) == restart + 1 and trial.step() >= 45 * (restart + 1), 200)
        cluster.run("scancel", "--signal=USR1", "--batch", trial.number)
    assert_same(trial, local)
    assert trial.reasons == ["asked (SIGUSR1)", "asked (SIGUSR1)", "done"]
    assert cluster.job(trial.number).restarts == 2
    first, second, third = trial.history
    assert (first.saved, second.saved) == (second.step, third.step)
    assert first.saved not in (None, 40, 60)  # at the step where it was, not at the next regular save


def test_a_node_that_crashes_in_the_middle_of_a_step(cluster: Cluster, tmp_path: Path, local: list[tuple[int, float]],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, config(tmp_path), monkeypatch, payload=False)
    until(lambda: trial.step() >= 50, 200)
    cluster.break_down("crash", "n3")
    until(lambda: trial.history[0].ended or cluster.job(trial.number).state == "PENDING", 200)
    cluster.break_down("up", "n3")
    assert_same(trial, local)
    assert len(trial.history) >= 2
    assert all(start.step >= 40 for start in trial.history[1:])
