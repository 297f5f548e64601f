"""What a user can get wrong with `pretrain train`: one line that says where, what and what would be right."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_train_command import slow_data, train
from tests.cli.tiny_run import checkpoints, losses, make_dataset, status, until, write_config
from tests.cli.warm import Forked, Warm

Args = tuple[str, ...]


def refused(run: Forked, code: int, *fragments: str) -> None:
    """Ends with `code` and one line, which holds each fragment."""
    assert run.wait() == code, run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.errors) == 1, run.stderr
    for fragment in fragments:
        assert fragment in run.errors[0]


@pytest.mark.parametrize(("sets", "fragments"), [
    (("optim.larning_rate=1",), ("optim.larning_rate", "--set")),
    (("batch.global_batch_size=7", "launch.nproc=2"), ("batch.global_batch_size", "7", "2 ranks", "6 or 8")),
    (("engine.precision=bf16", "engine.zero_stage=1"), ("engine.precision", "engine.zero_stage")),
    (("train.patience=2", "eval.every=null"), ("train.patience", "2", "eval.every is null")),
    (("launch.port=1",), ("launch.port", "1", "leave it out")),
], ids=lambda value: value[0] if isinstance(value, tuple) else None)
def test_what_a_config_can_tell_is_refused_before_a_rank_starts(sets: Args, fragments: Args, warm: Warm, folder: Path
                                                                ) -> None:
    if "launch.port=1" in sets:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            refused(train(warm, folder, f"launch.port={port}", environment={}), 2, f"launch.port: {port}", "in use")
    else:
        refused(train(warm, folder, *sets, environment={}), 2, *fragments)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("sets", "code", "fragments"), [
    (("data.source.path=nowhere",), 2, ("nowhere", "no dataset here", "pretrain prep")),
    (("data.source.split=tran",), 2, ("set", '"tran"', "train")),
    (("data.seq_len=64", "data.validation={kind: shards, path: set, split: vall}"), 2, ("vall", "val")),
    (("model.vocab_size=200",), 2, ("model.vocab_size", "200 is too small for data.source", "299", "300 or more")),
    (("data.source={kind: synthetic, vocab_size: 1000}",), 2, ("model.vocab_size", "300 is too small", "1000 or more")),
    (("train.patience=2", "data.source={kind: synthetic, vocab_size: 100}"), 2,
     ("train.patience", "nothing to evaluate on", "data.validation")),
    (("train.init_from=nowhere",), 2, ("train.init_from", "nowhere does not exist")),
    (("train.length=3 epochs", "data.source={kind: mixture, parts: [{weight: 1, source: {kind: shards, path: set}}]}"),
     2, ("train.length", "epochs")),
    (("objective.name=masked",), 2, ("objective.name", "masked")),
], ids=lambda value: value[0] if isinstance(value, tuple) else None)
def test_what_only_the_data_can_tell_is_refused_before_the_first_step(sets: Args, code: int, fragments: Args,
                                                                      warm: Warm, folder: Path) -> None:
    refused(train(warm, folder, *sets), code, *fragments)


def _flip(data: Path) -> None:
    content = bytearray((data / "train-000001.tar").read_bytes())
    content[3000] ^= 1
    (data / "train-000001.tar").write_bytes(content)


def _truncate(data: Path) -> None:
    os.truncate(data / "train-000002.tar", 1000)


def _remove(data: Path) -> None:
    (data / "train-000000.tar").unlink()


def _other_tokenizer(data: Path) -> None:
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (data / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(("damage", "fragments"), [
    (_flip, ("train-000001.tar", "SHA-256")), (_truncate, ("train-000002.tar", "1000 bytes")),
    (_remove, ("train-000000.tar", "missing")), (_other_tokenizer, ("tokenizer.json", "another tokenizer"))])
def test_damaged_data_end_with_3_before_the_first_step(damage: Callable[[Path], None], fragments: Args, warm: Warm,
                                                       folder: Path, tiny_dataset: Path) -> None:
    (folder / "set").unlink()
    shutil.copytree(tiny_dataset, folder / "set")
    damage(folder / "set")
    refused(train(warm, folder, "data.source.verify=full"), 3, *fragments)
    assert status(folder / "runs/tiny").state == "corrupt"
    assert status(folder / "runs/tiny").step == 0


@pytest.fixture(scope="module")
def trained(warm: Warm, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 6 steps, 4 of them in a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "set").symlink_to(tiny_dataset)
    write_config(folder)
    assert train(warm, folder, "train.length=6 steps").wait() == 0
    return folder


@pytest.mark.parametrize(("sets", "fragments"), [
    (("model.hidden_size=64",), ("step-6.f", "of another model", "model.hidden_size is 32 in the run, 64 here",
                                 "train.init_from")),
    (("model.rope_theta=500",), ("of another model", "model.rope_theta is 10000.0 in the run, 500.0 here")),
    (("model.num_layers=3",), ("of another model", "model.num_layers is 2 in the run, 3 here")),
    (("seed=1",), ("step-6.f", "other data, order or batch size", "seed is 42 in the run, 1 here")),
    (("batch.global_batch_size=4",), ("other data", "batch.global_batch_size is 8 in the run, 4 here")),
    (("data.source.split=val",), ("other data", "data.source.split is train in the run, val here")),
], ids=lambda value: value[0] if isinstance(value, tuple) else None)
def test_a_run_is_not_continued_as_another_one_and_stays_as_it_was(sets: Args, fragments: Args, warm: Warm,
                                                                   trained: Path) -> None:
    root = trained / "runs/tiny"
    before = (root / "config.yaml").read_text(), losses(root), checkpoints(root)
    refused(train(warm, trained, "train.length=9 steps", *sets), 2, *fragments)
    assert ((root / "config.yaml").read_text(), losses(root), checkpoints(root)) == before


def test_what_only_says_how_to_train_may_change(warm: Warm, trained: Path) -> None:
    shutil.copytree(trained / "runs/tiny", trained / "runs/changed")
    run = train(warm, trained, "name=changed", "model.dropout=0.1", "optim.lr=0.001", "data.workers=1",
                "train.length=7 steps")
    assert run.wait() == 0, run.stderr
    assert "changed since the last start: " in run.stderr
    assert "model.dropout is 0.0 in the run, 0.1 here" in run.stderr


def test_a_refused_fresh_start_hides_no_earlier_work(warm: Warm, trained: Path) -> None:
    root = trained / "runs/tiny"
    before = losses(root), checkpoints(root)
    refused(train(warm, trained, "train.resume=never", "data.source.path=nowhere"), 2, "nowhere")
    assert (losses(root), checkpoints(root)) == before


def test_weights_of_another_tokenizer_are_not_taken(warm: Warm, trained: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, seed=1)
    write_config(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "old")
    (tmp_path / "old/set").symlink_to(trained / "set")
    config = tmp_path / "old/tiny/config.yaml"
    config.write_text(config.read_text().replace("path: set", f"path: {trained / 'set'}"))
    refused(train(warm, tmp_path, "train.init_from=old/tiny"), 2, "train.init_from: old/tiny", "another tokenizer",
            "SHA-256", "tokenizer.path")
    refused(train(warm, trained, "name=other", "train.init_from=runs/tiny", "model.hidden_size=64"), 2,
            "train.init_from", "(300, 32)", "(300, 64)")
    assert train(warm, trained, "name=same", "train.init_from=runs/tiny", "train.length=2 steps").wait() == 0


def test_a_second_start_names_the_holder_and_leaves_the_first_alone(warm: Warm, folder: Path) -> None:
    first = train(warm, folder, "train.length=5000 steps", before=slow_data(0.02))
    until(lambda: len(losses(folder / "runs/tiny")) >= 2)
    refused(train(warm, folder), 2, "runs/tiny", f"process {first.pid} on {socket.gethostname()}",
            "pretrain control runs/tiny stop")
    reached = len(losses(folder / "runs/tiny"))
    until(lambda: len(losses(folder / "runs/tiny")) > reached + 2)
    first.send(15)
    assert first.wait() == 85


RANK_0_OF_2 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_a_world_that_does_not_assemble_names_who_is_missing(warm: Warm, folder: Path) -> None:
    refused(train(warm, folder, "launch.timeout=1", environment={**RANK_0_OF_2, "MASTER_PORT": "0"}), 2,
            "1 of 2 ranks came within 1 s", "missing: rank 1", "launch.timeout")
    assert not (folder / "runs").exists()


def test_a_rank_without_rank_0_says_where_it_looked(warm: Warm, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    alone = {**RANK_0_OF_2, "RANK": "1", "MASTER_PORT": port}
    refused(train(warm, folder, "launch.timeout=1", environment=alone), 2, "rank 1", f"127.0.0.1:{port}", "within 1 s")


def test_a_rendezvous_port_in_use_is_named(warm: Warm, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(train(warm, folder, environment={**RANK_0_OF_2, "MASTER_PORT": port}), 2, port, "in use", "MASTER_PORT")


@pytest.mark.parametrize(("changes", "fragments"), [
    ({"MASTER_PORT": "x"}, ("MASTER_PORT is 'x'",)), ({"MASTER_ADDR": ""}, ("MASTER_ADDR is not set",)),
    ({"RANK": "2"}, ("RANK is 2", "WORLD_SIZE 2"))])
def test_a_half_set_environment_is_named(changes: dict[str, str], fragments: Args, warm: Warm, folder: Path) -> None:
    environment = {**RANK_0_OF_2, "MASTER_PORT": "29500", **changes}
    refused(train(warm, folder, environment=environment), 2, "environment:", *fragments)


def test_a_folder_that_cannot_be_written_to_is_named(warm: Warm, folder: Path) -> None:
    (folder / "file").touch()
    refused(train(warm, folder, "runs_dir=file"), 2, "file/tiny", "Not a directory", "runs_dir")


NO_ROOM = """
import shutil
usage = shutil.disk_usage
class Full:
    count = 0
def disk_usage(path):
    Full.count += 1
    return usage(path)._replace(free=1000) if Full.count > {free_calls} else usage(path)
shutil.disk_usage = disk_usage
"""


def test_a_disk_without_room_for_a_checkpoint_is_named_before_training(warm: Warm, folder: Path) -> None:
    refused(train(warm, folder, before=NO_ROOM.format(free_calls=0)), 2, "runs/tiny/checkpoints", "0.05 GB are needed",
            "0.00 GB are free", "make room")
    assert losses(folder / "runs/tiny") == {}


def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(warm: Warm, folder: Path) -> None:
    refused(train(warm, folder, "checkpoint.every=5 steps", "eval.every=null", before=NO_ROOM.format(free_calls=2)), 2,
            "runs/tiny/checkpoints", "make room")
    assert checkpoints(folder / "runs/tiny") == {5: []}
    assert train(warm, folder, "train.length=12 steps").wait() == 0


BEYOND = """
import os, resource
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
def limit():
    resource.setrlimit(resource.RLIMIT_AS, (size + {room}, resource.RLIM_INFINITY))
"""
AT_START = "limit()\n"
AT_LOAD = """
from pretrain.engine import checkpoint
load = checkpoint.load
def beyond(*arguments):
    limit()
    bytearray(1 << 40)
checkpoint.load = beyond
"""


@pytest.mark.parametrize(("phase", "sets", "code"), [
    ("building the model", ("model.vocab_size=2000000", "model.hidden_size=512"), AT_START),
    ("the forward pass", ("batch.global_batch_size=4096",), AT_START),
    ("loading runs/tiny/checkpoints/step-6.f", (), AT_LOAD)], ids=["build", "forward", "load"])
def test_running_out_of_memory_is_one_line_with_a_cure(phase: str, sets: Args, code: str, warm: Warm, trained: Path,
                                                       tmp_path: Path) -> None:
    """A limit on the address space makes the allocators of C++ and Python give up, as a full machine does."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    name = "tiny" if code is AT_LOAD else "fresh"
    run = train(warm, tmp_path / "copy", f"name={name}", "train.length=9 steps", *sets,
                before=BEYOND.format(room=600 << 20) + code)
    refused(run, 2, "rank 0 ran out of memory in " + phase, "ulimit -v leaves it", "the estimate expects")
    assert status(tmp_path / f"copy/runs/{name}").state == "refused"
