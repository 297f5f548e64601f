"""Two real ranks of which one breaks: who tells the user, what is left, how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cli.test_train_command import slow_data
from tests.cli.tiny_run import checkpoints, losses, make_dataset, status, until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.launch]
ROOT = Path(__file__).resolve().parents[2]
RANK = "import os, sys\nexec(os.environ['BEFORE'])\nfrom pretrain.cli.main import main\nmain()\n"
LAUNCH = """
import json, sys
from pretrain.engine.launcher import launch
sys.exit(launch(json.loads(sys.argv[1]), 2, threads=1))
"""
AT_BATCH_5 = """
import os, signal
from pretrain.data.loader import UpdateLoader
read = UpdateLoader.__next__
def broken(loader):
    if loader._next_k == 5 and loader._rank == {rank}:
        {what}
    return read(loader)
UpdateLoader.__next__ = broken
"""


def at_batch_5(rank: int, what: str) -> str:
    """Statements that break one rank after five steps."""
    return AT_BATCH_5.format(rank=rank, what=what)


@contextmanager
def two_ranks(folder: Path, *sets: str, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """`pretrain train tiny.yaml` on two ranks that first run the statements `before`."""
    words = [word for value in sets for word in ("--set", value)]
    rank = [sys.executable, "-P", "-c", RANK, "train", "tiny.yaml", *words]
    launcher = subprocess.Popen([sys.executable, "-P", "-c", LAUNCH, json.dumps(rank)], cwd=folder, text=True,
                                stderr=subprocess.PIPE, env={**os.environ, "BEFORE": before, "PYTHONPATH": str(ROOT)})
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


def outcome(folder: Path, *sets: str, before: str = "") -> tuple[int, str]:
    """(exit code, standard error)."""
    with two_ranks(folder, *sets, before=before) as launcher:
        errors = launcher.communicate(timeout=180)[1]
        return launcher.returncode, errors


def descendants(pid: int) -> list[psutil.Process]:
    """Ranks and what they started."""
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_shows_one_traceback_and_takes_the_others_along(rank: int, folder: Path) -> None:
    code, errors = outcome(folder, before=at_batch_5(rank, "raise RuntimeError('boom')"))
    assert code == 1
    assert errors.count("Traceback") == 1
    assert errors.count("RuntimeError: boom") == 1
    assert f"rank {1 - rank} ends: rank {rank} has failed" in errors
    verdict = status(folder / "runs/tiny")
    assert (verdict.state, verdict.message, verdict.reason) == ("failed", "RuntimeError: boom", f"error on rank {rank}")
    assert len(losses(folder / "runs/tiny")) == 5


def test_an_error_with_a_meaning_on_one_rank_is_the_verdict_of_all(folder: Path) -> None:
    """Outside of what ranks agree on: the one that fails tells the others through the store."""
    before = """
from pretrain.engine.trainer import Trainer
from pretrain.errors import DataCorruption
one = Trainer._one
def broken(trainer, *arguments):
    if trainer.state.step == 5 and trainer.engine.world.rank == 1:
        raise DataCorruption("here: gone bad")
    return one(trainer, *arguments)
Trainer._one = broken
"""
    code, errors = outcome(folder, before=before)
    assert code == 3
    assert errors.count("error:") == 1
    assert "error: here: gone bad" in errors
    assert "Traceback" not in errors
    assert (status(folder / "runs/tiny").state, status(folder / "runs/tiny").message) == ("corrupt", "here: gone bad")


def test_a_rank_that_runs_out_of_memory_takes_the_others_along_with_one_line(folder: Path) -> None:
    before = """
import os
from pretrain.objectives.causal_lm import CausalLM
call = CausalLM.__call__
def full(self, model, batch, controls):
    if os.environ["RANK"] == "1" and int(batch.sample_ids[0]) >= 40:
        bytearray(1 << 60)
    return call(self, model, batch, controls)
CausalLM.__call__ = full
"""
    code, errors = outcome(folder, before=before)
    assert code == 2
    assert errors.count("error:") == 1
    assert "error: rank 1 ran out of memory in the forward pass" in errors
    assert "Traceback" not in errors
    assert status(folder / "runs/tiny").state == "refused"


def test_a_shard_that_is_corrupt_for_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    shards = make_dataset(tmp_path)
    write_config(tmp_path)
    content = bytearray((shards / "train-000001.tar").read_bytes())
    content[3000] ^= 1
    (shards / "train-000001.tar").write_bytes(content)
    sets = ("data.source.verify=touch", "data.order.shuffle=false", "checkpoint.every=null", "eval.every=null")
    code, errors = outcome(tmp_path, *sets)
    assert code == 3
    assert errors.count("error:") == 1
    assert "train-000001.tar" in errors
    assert "Traceback" not in errors
    assert checkpoints(tmp_path / "runs/tiny") == {max(losses(tmp_path / "runs/tiny")): []}


def test_an_error_that_all_ranks_share_is_told_once(folder: Path) -> None:
    before = """
from pretrain.objectives.causal_lm import CausalLM
call = CausalLM.__call__
def nan(self, model, batch, controls):
    result = call(self, model, batch, controls)
    return type(result)({name: value * float("nan") for name, value in result.sums.items()}, result.metrics)
CausalLM.__call__ = nan
"""
    code, errors = outcome(folder, "train.max_bad_steps=3", before=before)
    assert code == 4
    assert errors.count("error:") == 1
    assert "the last 3 updates were not finite (batches 0 to 2" in errors
    assert "Traceback" not in errors
    assert status(folder / "runs/tiny").state == "diverged"


def test_a_killed_rank_is_named_and_leaves_no_orphan(folder: Path) -> None:
    with two_ranks(folder, "train.length=5000 steps", "data.workers=1", "checkpoint.every=5 steps",
                   before=slow_data(0.02)) as launcher:
        until(lambda: checkpoints(folder / "runs/tiny"), 120)
        family = descendants(launcher.pid)
        assert len(family) >= 4
        rank_1 = next(p for p in family if p.environ().get("RANK") == "1" and p.ppid() == launcher.pid)
        rank_1.kill()
        errors = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 1
    assert "error: rank 1 was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "another rank" in status(folder / "runs/tiny").message


def test_ranks_of_a_killed_launcher_die_and_the_run_goes_on_at_once(folder: Path) -> None:
    constant = ("schedule.name=constant", "schedule.warmup=null", "eval.every=null")
    with two_ranks(folder, *constant, "train.length=5000 steps", "data.workers=1", "checkpoint.every=5 steps",
                   before=slow_data(0.02)) as launcher:
        until(lambda: len(losses(folder / "runs/tiny")) > 12, 120)
        family = descendants(launcher.pid)
        launcher.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(family, timeout=10)[1] == []
    assert status(folder / "runs/tiny").state == "running"
    assert outcome(folder, *constant, "train.length=30 steps")[0] == 0
    assert outcome(folder, *constant, "train.length=30 steps", "name=whole")[0] == 0
    assert losses(folder / "runs/tiny") == losses(folder / "runs/whole")


@pytest.mark.parametrize(("launcher", "code"), [
    (["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"], 1),
    (["deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--module"], 2)],
    ids=["torchrun", "deepspeed"])
def test_under_another_launcher_the_verdict_is_in_the_status(launcher: list[str], code: int, folder: Path) -> None:
    """Workers of torchrun abort at exit now and then, which is why a run may be tried again."""
    command = [sys.executable, "-P", "-m", *launcher, "pretrain.cli.main", "train", "tiny.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    for _ in range(3):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert (status(folder / "runs/tiny").state, status(folder / "runs/tiny").step) == ("done", 60)
    refused = subprocess.run([*command, "--set", "name=bad", "--set", "model.vocab_size=100"], cwd=folder,
                             env=environment, capture_output=True, text=True, timeout=180)
    assert refused.returncode == code  # torchrun: whatever the ranks returned
    assert (status(folder / "runs/bad").state, status(folder / "runs/bad").code) == ("refused", 2)
