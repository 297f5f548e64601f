"""A damaged checkpoint is named and passed over, and the run ends with the bits it would have had."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.tiny_run import status
from tests.cli.warm import Warm
from tests.faults.harness import Case, Outcome, new_case
from tests.faults.points import BY_NAME

pytestmark = pytest.mark.slow
MOMENTS = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def only(folder: Path, name: str) -> Path:
    """The file of a checkpoint whose name ends so."""
    [found] = [path for path in folder.rglob("*") if path.name.endswith(name)]
    return found


def other_step(folder: Path) -> None:
    """A file of another checkpoint of the same run: whole, of the right size, and not this one's."""
    shutil.copy(only(folder.with_name("step-6.f1"), MOMENTS), only(folder, MOMENTS))


def torn(folder: Path) -> None:
    os.truncate(folder / "manifest.json", (folder / "manifest.json").stat().st_size // 2)


def of_another_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in the weights": (lambda c: flip(only(c, "model_states.pt")), "model_states.pt: does not have"),
    "a flipped byte in the moments": (lambda c: flip(only(c, MOMENTS)), f"{MOMENTS}: does not have the bytes"),
    "a flipped byte in the random state": (lambda c: flip(c / "rng-1.safetensors"), "rng-1.safetensors: does not have"),
    "a changed cursor": (lambda c: (c / "state.json").write_text(
        (c / "state.json").read_text().replace('"k": 9', '"k": 8')), "state.json: does not have the bytes"),
    "a file of another step": (other_step, f"{MOMENTS}: does not have the bytes"),
    "a file cut short": (lambda c: os.truncate(only(c, MOMENTS), 1000), f"{MOMENTS}: has 1000 bytes"),
    "a removed file": (lambda c: only(c, MOMENTS).unlink(), f"{MOMENTS}: is missing"),
    "a file too many": (lambda c: shutil.copy(only(c, MOMENTS), c / "deepspeed" / f"b-{MOMENTS}"),
                        "is not in the manifest"),
    "a torn manifest": (torn, "manifest.json: cannot be read"),
    "a manifest of another format": (of_another_format, "manifest.json: cannot be read"),
    "a lost manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "an empty folder": (lambda c: [shutil.rmtree(c), c.mkdir()], "manifest.json: cannot be read"),
}


@pytest.fixture(scope="module")
def nine_steps(forking: Warm, fault_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A killed run with checkpoints of steps 6 and 9."""
    case = new_case(forking, fault_dataset, tmp_path_factory.mktemp("nine"))
    case.hit(BY_NAME["before the last checkpoint"], "all")
    assert [ref.step for ref in case.run_folder.checkpoints()] == [9, 6]
    return case


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint(damage: str, nine_steps: Case, tmp_path: Path, undisturbed: Outcome) -> None:
    case = nine_steps.copied_to(tmp_path)
    spoil, words = DAMAGES[damage]
    spoil(case.root / "checkpoints/step-9.f1")
    run = case.finish()
    assert "checkpoint step-9.f1 is passed over: " in run.stderr
    assert words in run.stderr
    assert "step-6.f1: step 6, batch 6" in run.stderr
    assert case.outcome() == undisturbed


def test_a_lost_pointer_loses_nothing(nine_steps: Case, tmp_path: Path, undisturbed: Outcome) -> None:
    case = nine_steps.copied_to(tmp_path)
    (case.root / "checkpoints/latest").write_text("step-6.f1\n")
    assert "step-9.f1: step 9, batch 9" in case.finish().stderr
    assert case.outcome() == undisturbed


def test_where_none_is_whole_the_start_is_refused_until_one_is_brought_back(nine_steps: Case, tmp_path: Path,
                                                                            undisturbed: Outcome) -> None:
    case = nine_steps.copied_to(tmp_path)
    for step in (6, 9):
        flip(case.root / f"checkpoints/step-{step}.f1/extra.safetensors")
    for _ in range(2):
        run = case.start()
        assert run.wait() == 3, run.stderr
        assert len(run.errors) == 1
        assert "none of 2 checkpoints is whole (the newest: " in run.errors[0]
        assert status(case.root).state == "corrupt"
    whole = case.root / "checkpoints/step-9.f1"
    shutil.rmtree(whole)
    shutil.copytree(nine_steps.root / "checkpoints/step-9.f1", whole)
    case.finish()
    assert case.outcome() == undisturbed


def test_the_copy_on_another_disk_ends_the_run_when_the_first_is_lost(nine_steps: Case, tmp_path: Path,
                                                                      undisturbed: Outcome) -> None:
    case = nine_steps.copied_to(tmp_path)
    shutil.rmtree(case.root)
    case.sets = ("runs_dir=disk", "checkpoint.mirror=null")
    case.use(tmp_path / "disk/tiny")
    run = case.finish()
    assert "resumed from disk/tiny/checkpoints/step-" in run.stderr
    assert case.outcome() == undisturbed
