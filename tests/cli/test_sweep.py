"""A sweep goes on where it stopped, a failed run stops no other, and the table pairs seeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from evaluation.sweep import sweep_cells
from pretrain.cli.sweep import sweep
from pretrain.config.sweep import SweepConfig
from pretrain.errors import CheckFailed, UserError
from tests.cli.tiny_run import make_dataset, status, write_config

FAKE = """
import json, sys, time
from pathlib import Path
from pretrain.config.load import dump_yaml, load_run_config
from pretrain.monitor.rows import encode
from pretrain.errors import ExitCode
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.status import Status
target, sets = sys.argv[2], sys.argv[4::2]
loaded = load_run_config(target, sets)
folder = RunFolder.create(Path(loaded.config.runs_dir) / loaded.config.name)
lease = Lease.acquire(folder)
lease.set_fresh()
folder.config_file.write_text(dump_yaml(loaded))
with open("order.txt", "a") as order:
    order.write(loaded.config.name + "\\n")
code = json.loads(Path("codes.json").read_text()).get(loaded.config.name, 0)
if code == "wait":
    time.sleep(60)
loss = loaded.config.optim.lr + loaded.config.seed
folder.metrics_jsonl.write_bytes(encode({"step": 60, "val/loss": loss, "val/loss/low": loss - 1}, lease.fence))
Status(fence=lease.fence).ended(ExitCode(code), "length reached").write(folder)
lease.release()
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep of 2 x 3 runs, in which `pretrain train` only pretends."""
    write_config(tmp_path)
    (tmp_path / "codes.json").write_text("{}")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
        "name": "lr", "presets": ["tiny.yaml"], "variants": {"low": ["optim.lr=0.25"], "high": ["optim.lr=0.75"]}},
        sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setattr("pretrain.engine.launcher.worker_command",
                        lambda module, *arguments: [sys.executable, "-P", "-c", FAKE, *arguments])
    return tmp_path


def run(place: Path, *, jobs: int = 1, table: bool = False) -> None:
    sweep(place / "sweep.yaml", sets=[], jobs=jobs, table=table)


def order(place: Path) -> list[str]:
    """Runs in the order in which they were started; empties the list."""
    path = place / "order.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_runs_are_trained_once_and_the_table_pairs_seeds(place: Path) -> None:
    run(place)
    assert order(place) == ["low-s41", "high-s41", "low-s42", "high-s42", "low-s43", "high-s43"]
    run(place)
    assert order(place) == []
    low, high = json.loads((place / "runs/lr/sweep.json").read_text())["cells"]
    assert (low["row"], low["mean"], low["minimum"], low["maximum"]) == ("low", 42.25, 41.25, 43.25)
    assert (low["lowest"], high["lowest"]) == (40.25, 40.75)
    assert high["difference"] == pytest.approx(0.5)
    assert high["interval"] == pytest.approx([0.5, 0.5])
    assert low["difference"] is None
    assert "| high | val/loss | 3 |" in (place / "runs/lr/sweep.md").read_text()


def test_the_lowest_bound_is_of_all_seeds_or_none() -> None:
    config = SweepConfig.model_validate({"name": "s", "presets": ["demo"], "seeds": [1, 2], "metrics": ["val/a"]})
    figures = {"demo-s1": {"val/a": 0.5}, "demo-s2": {"val/a": 0.75}}
    (cell,) = sweep_cells(config, figures, {"demo-s1": {"val/a": 0.25}, "demo-s2": {"val/a": 0.375}})
    assert (cell.mean, cell.lowest) == (0.625, 0.25)
    (cell,) = sweep_cells(config, figures, {"demo-s1": {"val/a": 0.25}})
    assert cell.lowest is None


def test_a_run_that_fails_is_told_and_stops_no_other(place: Path) -> None:
    (place / "codes.json").write_text('{"high-s41": 4}')
    with pytest.raises(CheckFailed, match=r"1 of 6 runs are not done: high-s41"):
        run(place, jobs=2)
    assert len(order(place)) == 6
    assert "- high-s41: diverged" in (place / "runs/lr/sweep.md").read_text()
    (place / "codes.json").write_text("{}")
    run(place)
    assert order(place) == ["high-s41"]


def test_a_run_with_other_values_than_the_sweep_is_not_taken_for_done(place: Path) -> None:
    run(place)
    order(place)
    text = (place / "sweep.yaml").read_text().replace("0.75", "0.5")
    (place / "sweep.yaml").write_text(text)
    run(place)
    assert order(place) == ["high-s41", "high-s42", "high-s43"]


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(place: Path) -> None:
    run(place)
    (place / "sweep.yaml").write_text((place / "sweep.yaml").read_text() + "metrics: [val/los]\n")
    with pytest.raises(UserError, match=r'no run has "val/los".*val/loss'):
        run(place, table=True)


def test_a_signal_reaches_the_run_and_ends_the_sweep(place: Path) -> None:
    """Also where the table has no figure yet, as its evaluations have not been made."""
    (place / "codes.json").write_text('{"high-s41": "wait"}')

    def interrupt() -> None:
        while not (place / "order.txt").exists() or "high" not in (place / "order.txt").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    before = time.monotonic()
    with pytest.raises(BaseException, match="85"):
        sweep(place / "sweep.yaml", sets=["metrics=[test/needle_hit_rate]"], jobs=1, table=False)
    assert time.monotonic() - before < 30
    assert order(place) == ["low-s41", "high-s41"]


@pytest.mark.slow
@pytest.mark.launch
def test_a_real_sweep(tmp_path: Path) -> None:
    """Two variants of the tiny run, evaluated; the second time nothing is done again."""
    make_dataset(tmp_path)
    write_config(tmp_path)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
        "name": "lr", "presets": ["tiny.yaml"], "variants": {"low": ["optim.lr=0.001"], "high": ["optim.lr=0.01"]},
        "seeds": [1, 2], "sets": ["train.length=20 steps"], "evaluate": ["--max-windows 8"]}, sort_keys=False))
    words = [sys.executable, "-P", "-m", "pretrain.cli.main", "sweep", "sweep.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stderr
    low, high = json.loads((tmp_path / "runs/lr/sweep.json").read_text())["cells"]
    assert high["difference"] < 0
    assert set(low["values"]) == {"1", "2"}
    assert 0 < low["lowest"] < low["minimum"]
    assert status(tmp_path / "runs/lr/low-s1").state == "done"
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert again.stdout.count("done before") == 4
