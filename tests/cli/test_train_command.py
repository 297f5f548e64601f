"""`pretrain train` as its users know it: signals, requests, stops and restarts of whole runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.runfolder.control import request
from pretrain.runfolder.layout import RunFolder
from tests.cli.tiny_run import checkpoints, losses, make_dataset, rows, status, until, write_config
from tests.cli.warm import Forked, Warm

SLOW_DATA = """
import time
from pretrain.data.loader import UpdateLoader
read = UpdateLoader.__next__
def slow(loader):
    time.sleep({seconds} if loader._next_k >= {first} else 0)
    return read(loader)
UpdateLoader.__next__ = slow
"""
CONSTANT = ("schedule.name=constant", "schedule.warmup=null", "eval.every=null")
EAGER_POLL = "import pretrain.engine.stopping as stopping\nstopping._POLL_SECONDS = 0.02\n"


def slow_data(seconds: float, first: int = 0) -> str:
    """Statements that make each batch from number `first` on take so long."""
    return SLOW_DATA.format(seconds=seconds, first=first)


def train(warm: Warm, folder: Path, *sets: str, before: str = "", **options: dict[str, str]) -> Forked:
    """Start `pretrain train tiny.yaml` with values set."""
    return warm.start(folder, ["train", "tiny.yaml", *(word for value in sets for word in ("--set", value))],
                      before=before, **options)


# Two ranks, through the real launcher: three launches.

@dataclass
class Launched:
    """How a launch ended."""

    code: int
    output: str
    losses: dict[int, float]


def launch(folder: Path, name: str, *, stop_at: int | None = None) -> Launched:
    """Train on two ranks; send SIGTERM to the launcher once step `stop_at` is logged."""
    command = [sys.executable, "-P", "-m", "pretrain.cli.main", "train", "tiny.yaml", "--nproc", "2",
               "--set", f"name={name}", "--set", "train.length=120 steps"]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if stop_at is not None:
            until(lambda: run.poll() is not None or len(losses(folder / "runs" / name)) >= stop_at, 120)
            run.terminate()
        output, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    return Launched(run.returncode, output + errors, losses(folder / "runs" / name))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    (folder / "set").symlink_to(tiny_dataset)
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(two_ranks: Path) -> Launched:
    return launch(two_ranks, "undisturbed")


@pytest.fixture(scope="module")
def stopped(two_ranks: Path) -> Launched:
    return launch(two_ranks, "stopped", stop_at=12)


@pytest.mark.launch
def test_two_ranks_train_to_the_end(undisturbed: Launched, two_ranks: Path) -> None:
    assert undisturbed.code == 0, undisturbed.output
    assert list(undisturbed.losses) == list(range(1, 121))
    verdict = status(two_ranks / "runs/undisturbed")
    assert (verdict.state, verdict.code, verdict.step, verdict.total_steps) == ("done", 0, 120, 120)
    assert verdict.reason == "length reached"
    assert (two_ranks / "runs/undisturbed/report.html").exists()


@pytest.mark.launch
def test_sigterm_to_the_launcher_saves_and_ends_with_85(stopped: Launched, two_ranks: Path) -> None:
    root = two_ranks / "runs/stopped"
    assert stopped.code == 85, stopped.output
    verdict = status(root)
    assert (verdict.state, verdict.code, verdict.reason, verdict.resumable) == ("stopped", 85, "SIGTERM", True)
    assert 12 <= verdict.step < 120
    assert checkpoints(root)[verdict.step] == []
    assert stopped.output.count("stopped at step") == 1
    assert "Traceback" not in stopped.output


@pytest.mark.launch
def test_the_same_command_again_ends_the_run_with_the_same_bits(undisturbed: Launched, stopped: Launched,
                                                                two_ranks: Path) -> None:
    resumed = launch(two_ranks, "stopped")
    assert resumed.code == 0, resumed.output
    assert f"resumed from runs/stopped/checkpoints/step-{len(stopped.losses)}.f1" in resumed.output
    assert resumed.losses == undisturbed.losses
    assert (status(two_ranks / "runs/stopped").state, status(two_ranks / "runs/stopped").restarts) == ("done", 1)


# One rank, forked.

@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_one_signal_saves_and_ends_with_85(number: signal.Signals, warm: Warm, folder: Path) -> None:
    run = train(warm, folder, "train.length=5000 steps", before=slow_data(0.01))
    until(lambda: len(losses(folder / "runs/tiny")) >= 3)
    run.send(number)
    assert run.wait() == 85, run.stderr
    verdict = status(folder / "runs/tiny")
    assert (verdict.state, verdict.reason, verdict.resumable) == ("stopped", number.name, True)
    assert checkpoints(folder / "runs/tiny")[verdict.step] == []


def test_a_second_sigint_ends_at_once_with_130(warm: Warm, folder: Path) -> None:
    run = train(warm, folder, before=slow_data(30, first=3))
    until(lambda: len(losses(folder / "runs/tiny")) == 3)
    run.send(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None
    run.send(signal.SIGINT)
    assert run.wait(5) == 130
    assert "interrupted twice" in run.stderr
    assert checkpoints(folder / "runs/tiny") == {}


def test_a_signal_before_the_first_step_leaves_at_once_and_loses_nothing(warm: Warm, folder: Path) -> None:
    hang = "import time\nimport pretrain.engine.setup as setup\nsetup.build_model = lambda *a: time.sleep(60)\n"
    run = train(warm, folder, before=hang)
    until(lambda: (folder / "runs/tiny/status.json").exists())
    run.send(signal.SIGTERM)
    assert run.wait(10) == 85
    assert "stopped before the first step (SIGTERM)" in run.stderr
    assert status(folder / "runs/tiny").resumable
    assert train(warm, folder, "train.length=5 steps").wait() == 0


SLOW_EVALUATION = """
import time
from pretrain.engine.views import TrainingView
forward = TrainingView.forward
def slow(view, **inputs):
    time.sleep(0.05)
    return forward(view, **inputs)
TrainingView.forward = slow
"""


def test_a_signal_in_the_final_evaluation_is_served_and_only_that_is_left(warm: Warm, folder: Path) -> None:
    root = folder / "runs/tiny"
    sets = ("train.length=4 steps", "batch.micro_batch_size=1", "eval.max_batches=null")
    run = train(warm, folder, *sets, before=SLOW_EVALUATION)
    until(lambda: len(losses(root)) == 4)
    run.send(signal.SIGTERM)
    assert run.wait() == 85, run.stderr
    assert (status(root).state, status(root).reason, status(root).step) == ("stopped", "SIGTERM", 4)
    assert checkpoints(root)[4] == []
    assert rows(root, "val/loss") == {}
    again = train(warm, folder, *sets)
    assert again.wait() == 0, again.stderr
    assert list(rows(root, "val/loss")) == [4]
    assert list(losses(root)) == [1, 2, 3, 4]
    assert status(root).state == "done"


def test_requests_in_the_control_folder_are_served(warm: Warm, folder: Path) -> None:
    root = folder / "runs/tiny"
    run = train(warm, folder, "train.length=5000 steps", "checkpoint.every=null", "eval.every=null",
                before=EAGER_POLL + slow_data(0.01))
    control = RunFolder(root)
    until(lambda: len(losses(root)) >= 6)
    request(control, "save")
    until(lambda: checkpoints(root))
    assert set(map(tuple, checkpoints(root).values())) == {()}
    request(control, "eval")
    until(lambda: rows(root, "val/loss"))
    (control.control_dir / "reload_lr").write_text("fast\n")
    until(lambda: "reload_lr: 'fast' is no learning rate" in run.stderr)
    request(control, "reload_lr", "0.0005")
    until(lambda: 0.0 < rows(root, "lr")[max(rows(root, "lr"))] <= 0.0005)
    (control.control_dir / "dance").touch()
    until(lambda: "dance: is no request" in run.stderr)
    request(control, "stop")
    assert run.wait() == 85, run.stderr
    verdict = status(root)
    assert (verdict.state, verdict.reason) == ("stopped", "control/stop")
    assert checkpoints(root)[verdict.step] == []
    again = train(warm, folder, "train.length=5000 steps", "train.max_hours=1e-9")
    assert again.wait() == 85
    assert "the learning rate is 0.0005, as control/reload_lr set it" in again.stderr


def test_a_request_that_comes_after_the_last_step_is_removed_with_a_line(warm: Warm, folder: Path) -> None:
    late = """
from pretrain.engine.keeping import Keeper
begin = Keeper.begin
def begun(keeper, *arguments, **options):
    (keeper.folder.control_dir / "stop").touch()
    return begin(keeper, *arguments, **options)
Keeper.begin = begun
"""
    sets = ("train.length=4 steps", "checkpoint.every=null", "eval.every=null")
    run = train(warm, folder, *sets, before=late)
    assert run.wait() == 0, run.stderr
    assert "control/stop: came after the end of the run and is removed" in run.stderr
    assert list((folder / "runs/tiny/control").iterdir()) == []
    (folder / "runs/tiny/control/stop").touch()
    again = train(warm, folder, *sets)
    assert again.wait() == 0, again.stderr
    assert "control/stop: came after the end" in again.stderr
    assert train(warm, folder, "train.length=6 steps").wait() == 0


def test_without_the_launcher_the_process_itself_is_the_rank(warm: Warm, folder: Path) -> None:
    words = ["train", "tiny.yaml", "--no-launcher", "--set", "launch.nproc=2", "--set", "train.length=4 steps"]
    run = warm.start(folder, words, environment={})
    assert run.wait() == 0, run.stderr
    assert list(losses(folder / "runs/tiny")) == [1, 2, 3, 4]
    holder = folder / "runs/tiny/lease/1/holder.json"
    assert json.loads(holder.read_text())["pid"] == run.pid
    for wrong in (["--nproc", "2"], []):  # the second one is a rank of somebody else
        refused = warm.start(folder, [*words, *wrong], environment={} if wrong else None)
        assert refused.wait() == 2
        assert refused.errors[0].startswith("error: --no-launcher: trains in one process")


def test_max_hours_stops_a_run_that_goes_on_afterwards(warm: Warm, folder: Path) -> None:
    run = train(warm, folder, "train.max_hours=1e-4", "train.length=5000 steps")
    assert run.wait() == 85, run.stderr
    verdict = status(folder / "runs/tiny")
    assert (verdict.state, verdict.reason) == ("stopped", "train.max_hours")
    again = train(warm, folder, f"train.length={verdict.step + 2} steps")
    assert again.wait() == 0, again.stderr
    assert list(losses(folder / "runs/tiny")) == list(range(1, verdict.step + 3))


def test_patience_ends_a_run_that_no_longer_improves(warm: Warm, folder: Path) -> None:
    run = train(warm, folder, "optim.lr=1e-30", "eval.every=2 steps", "train.patience=2")
    assert run.wait() == 0, run.stderr
    verdict = status(folder / "runs/tiny")
    assert (verdict.state, verdict.step) == ("done", 6)
    assert verdict.reason == "no improvement of val/loss in 2 evaluations"
    assert list(rows(folder / "runs/tiny", "val/loss")) == [2, 4, 6]
    lines = [line.split(" pretrain: ", 1)[-1] for line in run.stderr.splitlines()]
    assert [line for line in lines if line.startswith(("[MONITOR]", "[CHECKPOINT]"))] == [
        "[CHECKPOINT] Saved -> runs/tiny/checkpoints/step-2.f1", "[MONITOR] No improvement (1/2)",
        "[MONITOR] No improvement (2/2)", "[MONITOR] EARLY STOPPING TRIGGERED",
        "[CHECKPOINT] Saved -> runs/tiny/checkpoints/step-6.f1"]


def test_target_perplexity_ends_a_run_and_the_same_command_then_does_nothing(warm: Warm, folder: Path) -> None:
    root = folder / "runs/tiny"
    sets = ("eval.every=5 steps", "train.target_perplexity=100")
    run = train(warm, folder, *sets)
    assert run.wait() == 0, run.stderr
    perplexity = rows(root, "val/perplexity")
    assert status(root).reason.startswith("validation perplexity")
    assert perplexity[max(perplexity)] <= 100 < perplexity[max(perplexity) - 5]
    before = {path: path.stat().st_mtime_ns for path in [*root.rglob("step-*/**/*"), root / "metrics.jsonl"]}
    again = train(warm, folder, *sets)
    assert again.wait() == 0
    assert "runs/tiny is complete" in again.stderr
    assert "nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in [*root.rglob("step-*/**/*"), root / "metrics.jsonl"]} == before
    assert status(root).state == "done"


@pytest.fixture(scope="module")
def whole(warm: Warm, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of 30 steps at a constant learning rate, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "set").symlink_to(tiny_dataset)
    write_config(folder)
    assert train(warm, folder, *CONSTANT, "train.length=30 steps").wait() == 0
    return losses(folder / "runs/tiny")


def test_a_finished_run_goes_on_where_its_length_is_raised(warm: Warm, folder: Path, whole: dict[int, float]) -> None:
    assert train(warm, folder, *CONSTANT, "train.length=8 steps").wait() == 0
    assert train(warm, folder, *CONSTANT, "train.length=30 steps").wait() == 0
    assert losses(folder / "runs/tiny") == whole


def test_a_corrupt_shard_found_on_the_way_ends_with_3_and_costs_no_step(warm: Warm, tmp_path: Path) -> None:
    shards = make_dataset(tmp_path)
    write_config(tmp_path)
    sets = ("train.length=45 steps", "data.source.verify=touch", "data.order.shuffle=false", "checkpoint.every=null")
    good = (shards / "train-000001.tar").read_bytes()
    (shards / "train-000001.tar").write_bytes(bytes([*good[:3000], good[3000] ^ 1, *good[3001:]]))
    run = train(warm, tmp_path, *sets)
    assert run.wait() == 3
    assert len(run.errors) == 1
    assert "train-000001.tar" in run.errors[0]
    assert "Traceback" not in run.stderr
    reached = max(losses(tmp_path / "runs/tiny"))
    assert 0 < reached < 45
    assert checkpoints(tmp_path / "runs/tiny")[reached] == []
    assert status(tmp_path / "runs/tiny").state == "corrupt"
    (shards / "train-000001.tar").write_bytes(good)
    assert train(warm, tmp_path, *sets).wait() == 0
    assert train(warm, tmp_path, *sets, "name=whole").wait() == 0
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "runs/whole")


def test_a_killed_loader_process_is_named_and_costs_no_step(warm: Warm, folder: Path) -> None:
    kill = """
import os, signal
from pretrain.data.loader import UpdateLoader
read = UpdateLoader.__next__
def killed(loader):
    if loader._next_k == 7:
        for process in loader._processes():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return read(loader)
UpdateLoader.__next__ = killed
"""
    run = train(warm, folder, "data.workers=1", "data.prefetch=1", "checkpoint.every=null", before=kill)
    assert run.wait() == 1
    assert len(run.errors) == 1
    assert run.errors[0].startswith("error: rank 0: a data loader process died before it gave batch")
    assert "Traceback" not in run.stderr
    assert list(checkpoints(folder / "runs/tiny").values()) == [[]]
    assert train(warm, folder, "train.length=10 steps").wait() == 0


def test_a_killed_rank_is_succeeded_at_once(warm: Warm, folder: Path, whole: dict[int, float]) -> None:
    root = folder / "runs/tiny"
    run = train(warm, folder, *CONSTANT, "train.length=5000 steps", "checkpoint.every=10 steps",
                before=slow_data(0.01))
    until(lambda: len(losses(root)) >= 15)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert status(root).state == "running"
    assert train(warm, folder, *CONSTANT, "train.length=30 steps").wait() == 0
    assert losses(root) == whole
