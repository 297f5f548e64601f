"""Work shared between processes that know nothing of each other gives the very bytes of one that is alone."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from test_pipeline import hashes

from data_prep import build, plan
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare, prepare_share
from data_prep.workfolder import open_work
from pretrain.cli.main import main
from pretrain.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many pieces and units of a small corpus."""
    monkeypatch.setattr(build, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(plan, "PIECE_BYTES", 8000)


def units(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob(".d.partial/work/*/[0-9]*")}


@pytest.mark.parametrize("of", [2, 3, 50])
def test_shares_one_after_the_other_make_the_same_dataset(dataset, make_config, tmp_path, of):
    config = make_config(tmp_path / "d")
    first = [prepare_share(config, rank, of) for rank in range(of)]
    pieces = len(plan.make_plan(config, plan.list_files(config)))
    assert 5 < pieces < 50
    assert sum(share.pieces for share in first) == pieces
    assert all(share.missing > 0 and share.units == 0 for share in first[:min(of, pieces) - 1])
    assert first[-1].missing == 0
    again = [prepare_share(config, rank, of) for rank in range(of)]
    total = len(list(tmp_path.glob(".d.partial/work/read/*.unit")))
    assert sum(share.units for share in again) == total == len(list(tmp_path.glob(".d.partial/work/tokens/*.unit")))
    before = units(tmp_path)
    changed = []
    prepare(config, reporter=Look(lambda: changed.extend(p for p, t in units(tmp_path).items() if before.get(p) != t)))
    assert not changed
    assert hashes(tmp_path / "d") == hashes(dataset)


def test_a_share_that_arrives_while_another_sets_the_folder_up_waits_for_it(tmp_path, monkeypatch):
    stale, out = tmp_path / ".d.partial" / "work", tmp_path / "d"
    removal = threading.Event()
    stale.mkdir(parents=True)

    def removed_slowly(folder, **options):
        rmtree(folder, **options)
        removal.set()
        time.sleep(1)  # the second share has until here to make the folder in its turn

    rmtree = shutil.rmtree
    monkeypatch.setattr("data_prep.workfolder.shutil.rmtree", removed_slowly)
    failures = []

    def share():
        try:
            with open_work(out, {}, {}, shared=True) as folder:
                assert (folder / "work").is_dir()
        except Exception as error:
            failures.append(error)

    first, second = threading.Thread(target=share), threading.Thread(target=share)
    first.start()
    assert removal.wait(10)
    second.start()
    first.join(10)
    second.join(10)
    assert not failures
    assert not first.is_alive() and not second.is_alive()


class Look:
    def __init__(self, look):
        self.look = look

    def stage(self, name, total_bytes):
        self.look()

    def advance(self, size):
        self.look()


def work(config, rank, of):
    build.CHUNK_BYTES, plan.PIECE_BYTES = 3000, 8000
    while prepare_share(config, rank, of).missing:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_shares_at_the_same_time_one_of_them_killed(dataset, make_config, tmp_path):
    config = make_config(tmp_path / "d")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(config, rank, 3)) for rank in range(3)]
    for process in processes:
        process.start()
    while not list(tmp_path.glob(".d.partial/work/read/*.unit")):
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join()
    again = spawn.Process(target=work, args=(config, 1, 3))
    again.start()
    for process in [processes[0], processes[2], again]:
        process.join()
        assert process.exitcode == 0
    prepare(config)
    assert hashes(tmp_path / "d") == hashes(dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_whole_waits_for_shares_that_are_at_work(make_config, tmp_path):
    config, refused = make_config(tmp_path / "d"), []

    def look():
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(config)
        refused.append(True)
    prepare_share(config, 0, 2, reporter=Look(look))
    assert refused
    prepare(config)


def test_any_number_of_shares_may_do_the_rest(dataset, make_config, tmp_path):
    config = make_config(tmp_path / "d")
    prepare_share(config, 0, 4)
    prepare_share(config, 1, 3)
    prepare(config)
    assert hashes(tmp_path / "d") == hashes(dataset)


def test_a_share_of_another_config_is_refused_or_begins_afresh(make_config, tmp_path):
    prepare_share(make_config(tmp_path / "d"), 0, 2)
    assert prepare_share(make_config(tmp_path / "d", seed=1), 0, 1).missing == 0
    prepare(make_config(tmp_path / "d", seed=1))
    with pytest.raises(UserError, match="a dataset is here already"):
        prepare_share(make_config(tmp_path / "d", seed=1), 0, 2)


def test_the_command_says_what_is_missing(make_config, tmp_path, corpus, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(f"out: {tmp_path / 'd'}\nworkers: 1\ntokenizer: {{vocab_size: 300}}\n"
                                     f"sources:\n- {{kind: text, name: n, path: {corpus}}}\n")
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain", "prep", str(tmp_path / "c.yaml"), *words])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr()
    code, said = call("--rank", "1", "--of", "2")
    assert code == 0 and "of other shares are missing" in said.out
    code, said = call("--rank", "0", "--of", "2")
    assert code == 0 and "units tokenized; when all shares say so, run the command without --rank" in said.out
    assert call("--rank", "2", "--of", "2")[0] == 2
    assert call("--rank", "1")[0] == 2
    assert call()[0] == 0
    assert Manifest.load(tmp_path / "d").splits["train"].docs > 100
