"""Graphs of jobs on a real cluster: data in shares, interrupted training, evaluation, report; sweeps; arrays."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.config import PrepConfig
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare
from pretrain.cli.slurm import app
from pretrain.config.load import load_yaml_model
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status
from slurm.history import read_history
from tests.slurm.cluster import CONFIG, JOB, Cluster, until

pytest.importorskip("submitit", reason="submitit is not installed: it is in the extra [slurm]")
pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(900)]
WORDS = ["def", "return", "self", "import", "class", "value", "name", "for", "in", "if", "not", "path", "file", "open"]


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder on the cluster's login node, with text to prepare."""
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number:03d}.txt").write_text(" ".join(draw.choices(WORDS, k=300)) + "\n")
    (tmp_path / "prep.yaml").write_text(yaml.safe_dump({
        "out": str(tmp_path / "set"), "sources": [{"kind": "text", "name": "words", "path": str(tmp_path / "text")}],
        "splits": {"val": 0.15}, "tokenizer": {"vocab_size": 300}, "block_tokens": 512, "blocks_per_shard": 20,
        "workers": 1}))
    return tmp_path


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**CONFIG, "name": "run", "model": {**CONFIG["model"], "vocab_size": 300},
            "data": {"seq_len": 32, "source": {"kind": "shards", "path": str(folder / "set")}},
            "train": {"length": "120 steps"}, "checkpoint": {"every": "40 steps"},
            "slurm": {**JOB, "nodes": 2}, **changes}


def pretrain(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def stages(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split()[2].rstrip(":") for line in text.splitlines() if " job " in line}


def outputs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.rglob("submitit/*.err")))


def test_from_text_to_report_as_one_graph(cluster: Cluster, here: Path) -> None:
    long = config(here, train={"length": "600 steps"}, checkpoint={"every": "200 steps"})
    (here / "run.yaml").write_text(yaml.safe_dump(long))
    jobs = stages(pretrain("pipeline", "run.yaml", "--prep", "prep.yaml", "--shares", "2"))
    assert list(jobs) == ["prep-read", "prep-encode", "prep-merge", "train", "eval", "report"]
    folder = RunFolder(here / "runs/run")
    said = folder.slurm_dir / "submitit" / f"{jobs['prep-merge']}_0_log.out"
    try:
        until(lambda: said.exists() and "$ pretrain prep" in said.read_text(), 300)
        cluster.run("scancel", "--signal=USR2", jobs["prep-merge"])  # as before a preemption
        cluster.wait(jobs["train"], "RUNNING", timeout_s=300)
        assert cluster.job(jobs["prep-merge"]).restarts == 1
        assert Manifest.load(here / "set").splits["train"].tokens > 0
        until(lambda: len(folder.checkpoints()) > 0)
        cluster.run("scancel", "--signal=USR1", "--batch", jobs["train"])
        cluster.wait(jobs["report"], "COMPLETED", timeout_s=400)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{outputs(here)}") from None
    status = Status.read(folder)
    assert status is not None
    assert (status.state, status.step) == ("done", 600)
    assert cluster.job(jobs["train"]).restarts == 1
    assert list(folder.eval_dir.rglob("results.json"))
    assert folder.report_file.exists()
    assert read_history(folder)[-1].reason == "done"
    (here / "next.yaml").write_text(yaml.safe_dump(config(here, name="next")))
    again = stages(pretrain("pipeline", "next.yaml", "--prep", "prep.yaml"))
    assert list(again) == ["train", "eval", "report"]  # the data is there


def test_what_waits_for_a_failed_job_is_removed(cluster: Cluster, here: Path) -> None:
    shutil.rmtree(here / "text")
    (here / "run.yaml").write_text(yaml.safe_dump(config(here)))
    jobs = stages(pretrain("pipeline", "run.yaml", "--prep", "prep.yaml", "--shares", "1"))
    cluster.wait(jobs["prep-read"], "FAILED", timeout_s=180)
    for name in ("prep-encode", "prep-merge"):
        cluster.wait(jobs[name], "CANCELLED", timeout_s=180)


def test_a_sweep_is_an_array_with_a_cap_and_a_table_after_it(cluster: Cluster, here: Path) -> None:
    prepare(load_yaml_model(PrepConfig, here / "prep.yaml")[0])
    base = config(here, train={"length": "4 steps"}, checkpoint={"every": None}, slurm={**JOB, "nodes": 1})
    (here / "base.yaml").write_text(yaml.safe_dump(base))
    (here / "sweep.yaml").write_text(yaml.safe_dump({
        "name": "pair", "presets": {"base": "base.yaml"}, "variants": {"low": ["optim.lr=0.001"], "high": []},
        "seeds": [1], "metrics": ["val/loss"]}))
    jobs = stages(pretrain("sweep", "sweep.yaml", "--at-once", "1"))
    most = 0

    def ended() -> bool:
        nonlocal most
        running = cluster.run("squeue", "-h", "-r", "-t", "R", "-j", jobs["runs"], "-o", "%i", check=False).split()
        most = max(most, len(running))
        return cluster.job(jobs["table"]).state not in ("PENDING", "RUNNING", "COMPLETING")
    until(ended, 450, every_s=0.5)
    states = {path.parent.name: path.read_text() for path in here.rglob("runs/pair/*/status.json")}
    assert len(states) == 2, outputs(here)
    assert all('"state": "done"' in text for text in states.values())
    assert most == 1
    assert (here / "runs/pair/sweep.json").exists(), outputs(here)


def test_only_new_checkpoints_are_evaluated(cluster: Cluster, here: Path) -> None:
    prepare(load_yaml_model(PrepConfig, here / "prep.yaml")[0])
    short = config(here, slurm={**JOB, "nodes": 1}, train={"length": "80 steps"})
    (here / "run.yaml").write_text(yaml.safe_dump(short))
    train = pretrain("submit", "run.yaml").split()[2].rstrip(":")
    waiting = stages(pretrain("eval-new", "runs/run", "--after", train))["eval-new"]
    cluster.wait(waiting, "COMPLETED", timeout_s=400)
    assert len(list((here / "runs/run/eval").rglob("results.json"))) == 2, outputs(here)
    assert pretrain("eval-new", "runs/run") == "no checkpoint is new\n"
    shutil.rmtree(here / "runs/run/eval")
    (here / "runs/run/slurm/evaluated.json").unlink()
    text = pretrain("eval-new", "runs/run", "--at-once", "1")
    assert "steps 40, 80" in text
    cluster.wait(stages(text)["eval-new"], "COMPLETED", timeout_s=400)
    assert len(list((here / "runs/run/eval").rglob("results.json"))) == 2, outputs(here)
    assert pretrain("eval-new", "runs/run") == "no checkpoint is new\n"
