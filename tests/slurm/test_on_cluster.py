"""The sbatch file on a real cluster: what an operator would run, with a payload that needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.cli.slurm import app
from pretrain.engine.ranks import expand_nodes
from pretrain.runfolder.control import request
from tests.slurm.cluster import SLOW_STEPS, Cluster, assert_undisturbed, payload_config, submitted, until

pytestmark = pytest.mark.timeout(590)


def test_a_job_trains_to_its_end(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 30), monkeypatch)
    trial.end(200)
    assert_undisturbed(trial, 30)
    start, = trial.history
    assert (start.reason, start.action, start.saved, start.nodes) == ("done", "finish", 30, "n[1-4]")
    holder = json.loads((trial.root / "lease/1/holder.json").read_text())
    assert (holder["slurm_job"], holder["restart"], holder["host"]) == (trial.number, 0, "n1")


@pytest.mark.slow
def test_usr1_saves_and_requeues_as_often_as_it_comes(cluster: Cluster, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 60, every=1000, env=SLOW_STEPS), monkeypatch)
    for restart in range(2):
        until(lambda restart=restart: len(trial.history) == restart + 1 and trial.step() >= 15 * (restart + 1), 150)
        cluster.run("scancel", "--signal=USR1", "--batch", trial.number)
    job = trial.end(200)
    assert_undisturbed(trial, 60)
    assert job.restarts == 2
    assert trial.reasons == ["asked (SIGUSR1)", "asked (SIGUSR1)", "done"]
    first, second, third = trial.history
    assert (first.saved, second.saved) == (second.step, third.step)
    assert 0 < second.step < third.step < 60


def test_nothing_of_the_submitting_shell_reaches_the_ranks(cluster: Cluster, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SHELL", "1")
    monkeypatch.setenv("SBATCH_JOB_NAME", "overridden")
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 100, env={**SLOW_STEPS, "WANTED": "a 'b' $HOME `x`"}),
                      monkeypatch)
    until(lambda: trial.step() > 2, 150)
    pids = cluster.run("pgrep", "-f", str(trial.root / "slurm/config.yaml")).split()
    seen = [dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)
            for pid in pids]
    ranks = [environment for environment in seen if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment]
    assert len(ranks) >= 4
    for environment in seen:
        assert "SECRET_OF_THE_SHELL" not in environment
    assert {environment["WANTED"] for environment in ranks} == {"a 'b' $HOME `x`"}
    assert cluster.job(trial.number).name == "run"


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 500, every=1000, env=SLOW_STEPS), monkeypatch)
    until(lambda: trial.step() > 5, 150)
    cluster.run("scancel", trial.number)
    trial.end(200, "CANCELLED")
    until(lambda: trial.history[0].ended)  # the state is told at once, the batch script ends later
    start, = trial.history
    assert (start.reason, start.action) == ("cancelled", "finish")
    assert start.saved == trial.folder.checkpoints()[0].step > 5
    assert cluster.job(trial.number).restarts == 0


def test_a_run_that_is_asked_to_stop_is_not_started_again(cluster: Cluster, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 500, every=1000, env=SLOW_STEPS), monkeypatch)
    until(lambda: trial.step() > 5, 150)
    request(trial.folder, "stop")
    trial.end(200, "FAILED")  # exit code 85
    start, = trial.history
    assert (start.reason, start.action, start.code) == ("stopped: control/stop", "finish", 85)
    assert start.saved == trial.folder.checkpoints()[0].step > 5


@pytest.mark.slow
def test_a_start_without_progress_is_the_last(cluster: Cluster, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start breaks at the step at which the first one broke."""
    env = {**SLOW_STEPS, "PAYLOAD_BREAK_AT": "12"}
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 500, every=10, env=env), monkeypatch)
    trial.end(200, "FAILED")
    assert [start.action for start in trial.history] == ["requeue", "finish"]
    assert trial.reasons == ["broken on purpose", "broken on purpose; this start made no progress"]
    assert [ref.step for ref in trial.folder.checkpoints()] == [10]


def test_restarts_are_limited(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 500, env=SLOW_STEPS, max_restarts=0), monkeypatch)
    until(lambda: trial.step() > 5, 150)
    cluster.run("scancel", "--signal=USR1", "--batch", trial.number)
    trial.end(200, "FAILED")
    assert trial.reasons == ["asked (SIGUSR1); slurm.max_restarts 0 reached"]


@pytest.mark.slow
def test_a_chain_goes_on_where_requeueing_is_forbidden(cluster: Cluster, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = payload_config(tmp_path, 40, every=1000, env=SLOW_STEPS, restart="chain", max_restarts=2)
    trial = submitted(cluster, tmp_path, loaded, monkeypatch)
    assert len(trial.numbers) == 3
    until(lambda: trial.step() > 15, 150)
    cluster.run("scancel", "--signal=USR1", "--batch", trial.number)
    trial.end(200)
    assert_undisturbed(trial, 40)
    assert [(start.job, start.action) for start in trial.history] == [(trial.numbers[0], "next"),
                                                                      (trial.numbers[1], "finish")]
    assert f"nothing to do: job {trial.numbers[1]} ended: done" in trial.log()
    assert [cluster.job(number).restarts for number in trial.numbers] == [0, 0, 0]


def test_node_lists_are_read_as_slurm_reads_them(cluster: Cluster) -> None:
    for text in ("n[1-4]", "n[1-2,4],gpu-a", "r[01-02]n[08-11]", "a1,b[3,5-6]", "n[098-102]"):
        assert expand_nodes(text) == cluster.run("scontrol", "show", "hostnames", text).split()


def test_the_commands_of_an_operator(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    trial = submitted(cluster, tmp_path, payload_config(tmp_path, 400, env=SLOW_STEPS), monkeypatch)

    def pretrain(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    until(lambda: trial.step() > 12, 150)
    shown = json.loads(pretrain("status", trial.number, "--json"))
    assert (shown["state"], shown["nodes"], shown["restarts"], shown["root"]) == (
        "RUNNING", "n[1-4]", 0, str(trial.root))
    assert shown["step"] > 12
    assert 0 < shown["loss"] < 1
    assert [row["job"] for row in json.loads(pretrain("list", "--json"))] == [trial.number]
    assert "from the beginning" in pretrain("logs", "runs/run")
    assert "asked to save and stop" in pretrain("cancel", "runs/run")
    trial.end(200, "FAILED")
    assert (trial.history[0].saved or 0) > 12
    assert json.loads(pretrain("status", "runs/run", "--json"))["state"] == "stopped"
