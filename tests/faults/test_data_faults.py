"""Data that are spoilt under a running job, and loaders that die: the run ends with one line and a checkpoint, and goes
on to the same bits once the data are repaired.

The first shard is read in steps 1 to 4, the second in 5 to 8, the third, which is the one that suffers, from step 9 on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.tiny_run import losses, make_dataset, status
from tests.cli.warm import Warm
from tests.faults.harness import Case, Outcome, new_case
from tests.faults.inject import Point

pytestmark = pytest.mark.slow
SETTINGS = ("data.order.shuffle=false", "data.source.verify=touch", "eval.every=12 steps")
AT_STEP_6 = Point("after the optimizer", "pretrain.engine.build:Engine.step", "after", nth=6)
AT_STEP_5 = Point("after the optimizer", "pretrain.engine.build:Engine.step", "after", nth=5)
WORKER_AT_8 = Point("reading a batch", "pretrain.data.loader:UpdateLoader.__next__", "before", nth=8, rank=1)
SHARD = "train-000002.tar"
FLIP = f"""do:
with open(folder / "set/{SHARD}", "r+b") as file:
    file.seek(3000)
    byte = file.read(1)[0]
    file.seek(3000)
    file.write(bytes([byte ^ 1]))
"""
SPOILT = {
    "a flipped byte": (FLIP, SHARD),
    "a shard cut short": (f"do: os.truncate(folder / 'set/{SHARD}', 2000)", SHARD),
    "a shard removed": (f"do: os.unlink(folder / 'set/{SHARD}')", SHARD),
    "an index removed": ("do: os.unlink(folder / 'set/train-000002.idx')", "train-000002.idx"),
    "an index cut short": ("do: os.truncate(folder / 'set/train-000002.idx', 100)", "train-000002.idx"),
}


@pytest.fixture(scope="module")
def sequential_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four steps each."""
    return make_dataset(tmp_path_factory.mktemp("sequential"), blocks_per_shard=2)


@pytest.fixture(scope="module")
def read_in_order(forking: Warm, sequential_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a run over these data ends with."""
    case = new_case(forking, sequential_data, tmp_path_factory.mktemp("in-order"))
    case.sets = SETTINGS
    case.finish()
    return case.outcome()


@pytest.fixture
def reading(case: Case, sequential_data: Path) -> Case:
    """The same run with a copy of the data."""
    (case.folder / "set").unlink()
    shutil.copytree(sequential_data, case.folder / "set")
    case.sets = SETTINGS
    return case


def repair(case: Case, good: Path) -> None:
    shutil.rmtree(case.folder / "set")
    shutil.copytree(good, case.folder / "set")


@pytest.mark.parametrize("fault, workers", [(fault, number % 2) for number, fault in enumerate(SPOILT)])
def test_data_spoilt_under_a_running_job(fault: str, workers: int, reading: Case, sequential_data: Path,
                                         read_in_order: Outcome) -> None:
    do, named = SPOILT[fault]
    run = reading.hit(AT_STEP_6, do, f"data.workers={workers}", "data.prefetch=1")
    assert run.code == 3, run.stderr
    assert len(run.errors) == 1, run.stderr
    assert named in run.errors[0]
    assert "Traceback" not in run.stderr
    verdict = status(reading.root)
    assert (verdict.state, verdict.message) == ("corrupt", run.errors[0].removeprefix("error: "))
    assert reading.newest() == max(losses(reading.root)) >= 6
    again = reading.start()
    assert again.wait() == 3
    assert named in again.errors[0]
    repair(reading, sequential_data)
    reading.finish()
    assert reading.outcome() == read_in_order


def test_validation_data_that_are_gone_when_they_are_evaluated(reading: Case, sequential_data: Path) -> None:
    run = reading.hit(AT_STEP_5, "do: os.unlink(folder / 'set/val-000001.tar')", "eval.every=6 steps")
    assert run.code == 3, run.stderr
    assert len(run.errors) == 1, run.stderr
    assert "val-000001.tar" in run.errors[0]
    assert "Traceback" not in run.stderr
    assert reading.newest() == 3
    repair(reading, sequential_data)
    reading.finish("eval.every=6 steps")
    assert list(losses(reading.root)) == list(range(1, 13))


def test_a_mapped_shard_cut_short_is_named_at_the_next_start(reading: Case, sequential_data: Path,
                                                             read_in_order: Outcome) -> None:
    """The kernel kills a process that reads past the end of a mapped file: nobody can say which one it was."""
    run = reading.hit(AT_STEP_6, "do: os.truncate(folder / 'set/train-000001.tar', 0)")
    assert run.code == 1
    assert "was killed by SIGBUS; a file that it had mapped has become shorter: a data shard, perhaps" in run.stderr
    again = reading.start()
    assert again.wait() == 3
    assert "train-000001.tar" in again.errors[0]
    repair(reading, sequential_data)
    reading.finish()
    assert reading.outcome() == read_in_order


@pytest.mark.parametrize("number", ["KILL", "SEGV"])
def test_a_loader_process_that_dies(number: str, reading: Case, read_in_order: Outcome) -> None:
    kill = f"""do:
import multiprocessing, signal
for child in multiprocessing.active_children():
    os.kill(child.pid, signal.SIG{number})
    child.join()
"""
    run = reading.hit(WORKER_AT_8, kill, "data.workers=1", "data.prefetch=1")
    assert run.code == 1, run.stderr
    assert len(run.errors) == 1, run.stderr
    assert run.errors[0].startswith("error: rank 1: a data loader process died before it gave batch")
    assert "Traceback" not in run.stderr
    assert reading.newest() == max(losses(reading.root)) >= 7
    reading.finish()
    assert reading.outcome() == read_in_order


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_raises(workers: int, reading: Case, read_in_order: Outcome) -> None:
    """An error without a meaning is a bug: its traceback is shown, and nothing that was saved is lost."""
    point = Point("reading rows", "pretrain.data.loader:read_rows", "before", nth=8, rank=1)
    run = reading.hit(point, "do: raise RuntimeError('boom')", f"data.workers={workers}")
    assert run.code == 1, run.stderr
    assert "RuntimeError: boom" in run.stderr
    assert "boom" in status(reading.root).message
    assert reading.newest() in (3, 6)
    reading.finish()
    assert reading.outcome() == read_in_order


@pytest.mark.parametrize("file", ["manifest.json", "train.shards.bin", "tokenizer.json"])
def test_a_dataset_without_one_of_its_files_does_not_start(file: str, reading: Case, sequential_data: Path,
                                                           read_in_order: Outcome) -> None:
    reading.hit(AT_STEP_6, "all")
    (reading.folder / "set" / file).unlink()
    run = reading.start()
    assert run.wait() in (2, 3)
    assert len(run.errors) == 1
    assert file in run.errors[0]
    repair(reading, sequential_data)
    reading.finish()
    assert reading.outcome() == read_in_order
