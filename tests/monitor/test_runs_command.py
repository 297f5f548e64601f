"""`pretrain runs ls` and `pretrain control` on real run folders."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pretrain.cli.control import control
from pretrain.cli.runs import app
from pretrain.errors import ExitCode, UserError
from pretrain.monitor.writers import MetricsWriter
from pretrain.runfolder.control import poll
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.status import Status


@pytest.fixture
def runs(tmp_path):
    """One run at work, one killed, one that ended, one that only just began, and a folder that is no run."""
    source = f"from pathlib import Path; tmp_path = Path({str(tmp_path)!r})\n" \
             "from pretrain.runfolder.layout import RunFolder\nfrom pretrain.runfolder.lease import Lease\n" \
             "from pretrain.runfolder.status import Status\n" \
             "folder = RunFolder.create(tmp_path / 'killed')\n" \
             "Status(Lease.acquire(folder).fence, step=7).write(folder)\n"
    subprocess.run([sys.executable, "-P", "-c", source], check=True, timeout=60)
    for name, code in (("alive", None), ("ended", ExitCode.STOPPED)):
        folder = RunFolder.create(tmp_path / name)
        lease = Lease.acquire(folder)
        lease.set_fresh()
        writer = MetricsWriter(folder, (), False, None, lease.fence)
        writer.write({"step": 10, "loss": 3.5, "tokens_per_second": 1234.5})
        writer.write({"step": 12, "val/loss": 3.6})
        writer.close()
        status = Status(lease.fence, step=12, total_steps=20)
        (status if code is None else status.ended(code, "SIGTERM")).write(folder)
        if code is not None:
            lease.release()
    RunFolder.create(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    return tmp_path


def listed(*words: str) -> list[dict]:
    result = CliRunner().invoke(app, ["ls", *words, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_runs_are_listed_with_their_state(runs):
    rows = {row["name"]: row for row in listed(str(runs))}
    assert {name: row["state"] for name, row in rows.items()} == \
        {"alive": "running", "killed": "dead", "ended": "stopped", "empty": "empty"}
    alive = rows["alive"]
    assert (alive["step"], alive["total_steps"], alive["loss"], alive["tokens_per_second"]) == (12, 20, 3.5, 1234.5)
    assert alive["bytes"] == sum(path.stat().st_size for path in (runs / "alive").rglob("*") if path.is_file())
    assert [row["name"] for row in listed(str(runs / "alive"))] == ["alive"]
    text = CliRunner().invoke(app, ["ls", str(runs)], catch_exceptions=False).stdout
    assert "12/20" in text
    assert "1,234" in text


def test_a_broken_run_does_not_hide_the_others(runs):
    (runs / "alive" / "status.json").write_text("{")
    rows = {row["name"]: row["state"] for row in listed(str(runs))}
    assert rows["alive"].startswith("unreadable: ")
    assert rows["ended"] == "stopped"


def test_control_says_whether_anyone_listens(runs, capsys):
    control(runs / "alive", "save", None)
    assert "left for process" in capsys.readouterr().out
    control(runs / "killed", "reload_lr", "1e-4")
    assert "no process holds" in capsys.readouterr().out
    assert poll(RunFolder(runs / "alive")) == {"save": ""}
    assert poll(RunFolder(runs / "killed")) == {"reload_lr": "1e-4"}
    with pytest.raises(UserError, match="is no run folder"):
        control(runs / "other", "save", None)


def test_listing_runs_loads_no_torch(runs):
    code = "import sys; from pretrain.cli.runs import ls; ls(__import__('pathlib').Path(sys.argv[1]), False); " \
           "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code, str(runs)], check=True, timeout=60, stdout=subprocess.DEVNULL)
