"""`pretrain train CONFIG --branch NAME`: another run that begins where this one stood."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.runfolder.layout import is_run_folder
from tests.cli.test_train_command import CONSTANT, slow_data
from tests.cli.test_train_refusals import refused
from tests.cli.tiny_run import checkpoints, losses, rows, status, until, write_config
from tests.cli.warm import Forked, Warm

PARENT = (*CONSTANT, "train.length=16 steps", "checkpoint.every=8 steps")


def train(warm: Warm, folder: Path, *words: str, sets: tuple[str, ...] = (), before: str = "") -> Forked:
    """Start `pretrain train tiny.yaml WORDS` with values set."""
    return warm.start(folder, ["train", "tiny.yaml", *words, *(w for value in sets for w in ("--set", value))],
                      before=before)


@pytest.fixture(scope="module")
def parent(warm: Warm, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 16 steps that saved at 8 and 16."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "set").symlink_to(tiny_dataset)
    write_config(folder)
    run = train(warm, folder, sets=PARENT)
    assert run.wait() == 0, run.stderr
    return folder


def test_an_unchanged_branch_goes_the_way_of_its_parent_and_is_resumed_as_itself(warm: Warm, parent: Path) -> None:
    root, child = parent / "runs/tiny", parent / "runs/same"
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    first = train(warm, parent, "--branch", "same", "--from-step", "8", sets=PARENT)
    assert first.wait() == 0, first.stderr
    assert "a branch of runs/tiny, begun at step 8" in first.stderr
    assert "resumed from runs/same/checkpoints/step-8.f1: step 8, batch 8" in first.stderr
    assert losses(child) == losses(root)
    assert checkpoints(child) == {16: [], 8: []}
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == before
    again = train(warm, parent, "--branch", "same", "--from-step", "8", sets=(*PARENT, "train.length=20 steps"))
    assert again.wait() == 0, again.stderr
    assert "resumed from runs/same/checkpoints/step-16.f2: step 16" in again.stderr
    assert list(losses(child)) == list(range(1, 21))
    assert (status(child).step, status(root).step) == (20, 16)
    shown = json.loads(CliRunner().invoke(app, ["runs", "ls", str(parent / "runs"), "--json"]).stdout)
    origin = {row["name"]: row["branch"] for row in shown}
    assert origin["tiny"] is None
    assert (origin["same"]["parent"], origin["same"]["step"], origin["same"]["fence"]) == ("runs/tiny", 8, 1)
    assert "tiny at step 8" in CliRunner().invoke(app, ["runs", "ls", str(parent / "runs")]).stdout


def test_a_branch_on_other_data_begins_them_anew_and_keeps_its_step(warm: Warm, parent: Path) -> None:
    run = train(warm, parent, "--branch", "other-data", sets=(*PARENT, "seed=7", "train.length=18 steps"))
    assert run.wait() == 0, run.stderr
    assert "the branch begins on other data (seed is 42 in the run, 7 here): with their first batch" in run.stderr
    assert {step: k for step, k in rows(parent / "runs/other-data", "k").items() if step > 16} == {17: 1, 18: 2}
    refused(train(warm, parent, "--branch", "other-data", sets=(*PARENT, "seed=8")), 2,
            "seed is 7 in the run, 8 here", "--branch NAME")


def test_a_branch_with_another_batch_size_goes_on_after_the_samples_seen(warm: Warm, parent: Path) -> None:
    sets = (*PARENT, "batch.global_batch_size=12", "train.length=18 steps")
    run = train(warm, parent, "--branch", "batch", sets=sets)
    assert run.wait() == 0, run.stderr
    assert "8 samples in the parent, 12 here; the order goes on after sample 127" in run.stderr
    assert {step: k for step, k in rows(parent / "runs/batch", "k").items() if step > 16} == {17: 12, 18: 13}


def test_a_branch_is_not_of_another_model_and_a_corrected_command_begins_it(warm: Warm, parent: Path) -> None:
    command = ("--branch", "model", "--from-step", "8")
    refused(train(warm, parent, *command, sets=(*PARENT, "model.hidden_size=64")), 2, "runs/model/checkpoints/step-8",
            "another model (model.hidden_size is 32 in the run, 64 here)", "train.init_from")
    run = train(warm, parent, *command, sets=(*PARENT, "optim.lr=0.001", "train.length=10 steps"))
    assert run.wait() == 0, run.stderr
    assert "optim.lr: holds from the next update on" in run.stderr
    assert rows(parent / "runs/model", "lr")[9] == 0.001


@pytest.mark.parametrize(("words", "sets", "fragments"), [
    (("--from-step", "8"), (), ("--from-step belongs to --branch NAME",)),
    (("--branch", "x"), ("train.resume=never",), ("train.resume: never starts afresh", "--branch")),
    (("--branch", "tiny"), (), ("runs/tiny: a branch needs another name",)),
    (("--branch", "a b"), (), ("name = a b", "--set")),
    (("--branch", "x", "--from-step", "3"), (), ("runs/tiny: has no checkpoint of step 3; there are 8, 16",)),
    (("--branch", "x"), ("name=nobody",), ("runs/nobody: there is no such folder",)),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_a_branch_that_cannot_be_is_refused(words: tuple[str, ...], sets: tuple[str, ...], fragments: tuple[str, ...],
                                            warm: Warm, parent: Path) -> None:
    refused(train(warm, parent, *words, sets=sets), 2, *fragments)
    assert not is_run_folder(parent / "runs/x")


def test_the_parent_may_train_meanwhile(warm: Warm, folder: Path) -> None:
    run = train(warm, folder, sets=(*PARENT, "train.length=5000 steps"), before=slow_data(0.02))
    until(lambda: checkpoints(folder / "runs/tiny"))
    child = train(warm, folder, "--branch", "child", sets=(*PARENT, "train.length=20 steps"))
    assert child.wait() == 0, child.stderr
    assert run.poll() is None
    run.send(signal.SIGTERM)
    assert run.wait() == 85, run.stderr
    steps = losses(folder / "runs/child")
    assert list(steps) == list(range(1, 21))
    assert steps.items() <= losses(folder / "runs/tiny").items()
