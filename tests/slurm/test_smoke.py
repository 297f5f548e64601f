"""The smoke job: its judgement without a cluster, and the whole of it on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pretrain.cli.slurm import app
from slurm.smoke import judge
from tests.slurm.cluster import CONFIG, JOB, Cluster

ROW: dict[str, Any] = {"rank": 0, "node": "n1", "cpus": 8, "address": "10.0.0.1", "clock": 100.0, "disk": 1e9,
                       "free": 1e12, "gpus": 8, "gpu": "H100"}


@pytest.mark.parametrize(("change", "name", "state", "text"), [
    ({}, "names", "ok", "10.0.0.1"),
    ({"address_error": "Name or service not known"}, "names", "problem", "n2 cannot resolve the machine of rank 0"),
    ({"address": "127.0.1.1"}, "names", "note", "GLOO_SOCKET_IFNAME"),
    ({"clock": 103.0}, "clocks", "note", "within 3.00 s"),
    ({"clock": 100.2}, "clocks", "ok", "within 0.20 s"),
    ({"disk": 5e6}, "run folder", "note", "5 MB/s a rank"),
    ({"disk_error": "/r: Permission denied"}, "run folder", "problem", "n2: /r: Permission denied"),
    ({"gpus": 7}, "gpus", "problem", "n2 shows 7 of 8 GPUs"),
    ({}, "gpus", "ok", "8 x H100 on each machine"),
])
def test_what_is_found_is_judged(change: dict[str, Any], name: str, state: str, text: str) -> None:
    rows = [ROW, {**ROW, "rank": 1, "node": "n2", **change}]
    check = next(check for check in judge(rows, 8) if check.name == name)
    assert (check.state, text in check.text) == (state, True), check


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(400)
def test_an_unknown_cluster(wired: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, wired.environment[name])
    (tmp_path / "any.yaml").write_text(yaml.safe_dump({**CONFIG, "name": "any", "slurm": JOB}))
    result = CliRunner().invoke(app, ["smoke", "any.yaml", "--wait", "300"])
    logs = "\n".join(path.read_text() for path in tmp_path.rglob("*.out"))
    assert result.exit_code == 0, f"{result.output}\n{result.exception}\n{logs}"
    for row in ("ok      machines      2 ranks on n1, n2", "ok      names         the machine of rank 0 is 10.213.0.11",
                "ok      clocks", "ok      python        torch imported in", "ok      shared folder",
                "ok      all-reduce",
                "ok      signal        came", "ok      time limit    the signal before it is told from other signals",
                "ok      requeue       the job requeued itself and waited"):
        assert row in result.output, result.output
