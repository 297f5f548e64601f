from __future__ import annotations

import threading

import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.errors import ExitCode, UserError
from pretrain.runfolder import control
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease
from pretrain.runfolder.status import VERDICTS, Status


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path)


def test_requests_are_handed_out_once(folder):
    control.request(folder, "save")
    control.request(folder, "reload_lr", "1e-4")
    (folder.control_dir / "eval").touch()  # by hand
    assert control.poll(folder) == {"eval": "", "reload_lr": "1e-4", "save": ""}
    assert control.poll(folder) == {}
    assert list(folder.control_dir.iterdir()) == []


def test_two_pollers_share_a_request_between_them(folder, caplog):
    for _ in range(100):
        control.request(folder, "save")
        barrier = threading.Barrier(2)
        taken: list[dict[str, str]] = []

        def take(barrier=barrier, taken=taken) -> None:
            barrier.wait()
            taken.append(control.poll(folder))

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(len, taken)) == [0, 1]
    assert caplog.text == ""


def test_unknown_requests_are_reported_once_and_stop_nobody(folder, caplog):
    (folder.control_dir / "sav").touch()
    (folder.control_dir / "stop").mkdir()
    control.request(folder, "save")
    assert control.poll(folder) == {"save": ""}
    assert "sav: is no request" in caplog.text
    caplog.clear()
    assert control.poll(folder) == {}
    assert caplog.text == ""


@pytest.mark.parametrize("name, value", [("sav", None), ("../x", None), ("save", "1"), ("reload_lr", "fast"),
                                         ("reload_lr", "nan"), ("reload_lr", "-1")])
def test_bad_requests_are_refused(folder, name, value):
    with pytest.raises(UserError, match=name):
        control.request(folder, name, value)
    assert control.poll(folder) == {}


def test_every_exit_code_has_a_verdict(folder):
    lease = Lease.acquire(folder)
    assert set(VERDICTS) == set(ExitCode)
    assert len(set(VERDICTS.values())) == len(ExitCode)
    for code in ExitCode:
        written = Status(lease.fence, step=3, k=4, total_steps=9).ended(code, "why", "line").write(folder)
        read = Status.read(folder)
        assert read == written
        assert read.code == code
        assert read.resumable == (code == ExitCode.STOPPED)
        assert read.state != "running"


def ask(folder, *words):
    return CliRunner().invoke(app, ["control", str(folder.root), *words])


def test_a_request_to_a_run_that_is_done_is_refused_and_leaves_nothing(folder):
    lease = Lease.acquire(folder)
    running = Status(lease.fence, step=9, total_steps=9)
    running.write(folder)
    assert "left for process" in ask(folder, "save").stdout
    assert control.poll(folder) == {"save": ""}
    running.ended(ExitCode.DONE, "length reached").write(folder)
    lease.release()
    done = ask(folder, "stop")
    assert isinstance(done.exception, UserError)
    assert "is done at step 9; no process is left to stop" in str(done.exception)
    assert control.poll(folder) == {}


def test_a_request_to_a_run_that_was_stopped_waits_for_its_next_start(folder):
    lease = Lease.acquire(folder)
    Status(lease.fence, step=4, total_steps=9).ended(ExitCode.STOPPED, "SIGTERM").write(folder)
    lease.release()
    assert "left for the next start" in ask(folder, "reload_lr", "--value", "1e-4").stdout
    assert control.poll(folder) == {"reload_lr": "1e-4"}
