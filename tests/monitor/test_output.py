"""What reaches the console, the log file, and environment.json."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pretrain.errors import UserError
from pretrain.monitor.environment import describe_environment
from pretrain.monitor.logs import setup_logging
from pretrain.monitor.progress import Progress, format_line

ROW = {"step": 120, "loss": 4.51234, "lr": 2.4e-4, "tokens_per_second": 7512.4, "grad_norm": 1.2345, "skipped": 0,
       "eta_seconds": 751.2, "val/loss": 4.2}
LINE = "step 120/1000 | loss 4.5123 | lr 2.40e-04 | 7,512 tok/s | grad 1.23 | skipped 0 | eta 0:12:31"


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    logging.captureWarnings(False)


def test_the_line_of_a_row():
    assert format_line(ROW, 1000) == LINE
    late = {"step": 5, "loss": float("nan"), "eta_seconds": 90061.0}
    assert format_line(late, 9) == "step 5/9 | loss nan | eta 25:01:01"
    assert format_line({"step": 7, "val/loss": 3.0}, 9) == "step 7/9"


@pytest.mark.parametrize("mode, shown", [("lines", True), ("auto", True), ("off", False), ("bar", False)])
def test_rows_reach_the_log_file_in_every_mode_and_the_console_as_asked(tmp_path, capsys, mode, shown):
    console = setup_logging("info", tmp_path / "train.log", 0)
    assert not console.is_terminal
    progress = Progress(mode, 1000, console)
    progress.update(ROW)
    progress.close()
    assert (tmp_path / "train.log").read_text().count(LINE) == 1
    assert (f": {LINE}" in capsys.readouterr().err) == shown


def test_the_bar_shows_the_row():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    progress = Progress("auto", 1000, console)
    progress.update(ROW)
    progress.close()
    text = console.file.getvalue()
    assert "120/1000" in text
    assert "loss 4.5123 | lr 2.40e-04" in text


def test_every_record_is_written_once_however_often_logging_is_set_up(tmp_path, capsys):
    logging.basicConfig(level="INFO", force=False)
    for _ in range(3):
        setup_logging("info", tmp_path / "train.log", 0)
    logging.getLogger("pretrain.x").info("once")
    assert (tmp_path / "train.log").read_text().count("once") == 1
    assert capsys.readouterr().err.count("once") == 1


def test_other_ranks_write_warnings_to_the_file_with_their_rank(tmp_path, capsys):
    setup_logging("debug", tmp_path / "train.log", 3)
    logging.getLogger("pretrain.x").info("quiet")
    logging.getLogger("pretrain.x").warning("loud")
    text = (tmp_path / "train.log").read_text()
    assert "rank 3 WARNING pretrain.x: loud" in text
    assert "quiet" not in text
    assert capsys.readouterr().err == ""


def test_talkative_libraries_are_heard_from_warnings_up_and_once(tmp_path, capsys):
    noisy = logging.getLogger("DeepSpeed")
    noisy.addHandler(logging.StreamHandler(sys.stderr))
    noisy.propagate = False
    setup_logging("info", tmp_path / "train.log", 0)
    noisy.info("chatter")
    noisy.warning("serious")
    err = capsys.readouterr().err
    assert "chatter" not in err
    assert err.count("serious") == 1
    assert "DeepSpeed: serious" in (tmp_path / "train.log").read_text()


def test_bad_logging_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="'loud' is unknown; one of debug"):
        setup_logging("loud", None, 0)
    with pytest.raises(UserError, match="cannot be written"):
        setup_logging("info", tmp_path, 0)


def test_environment_tells_slurm_ids_and_no_secret(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JWT", "s3cr3t-a")
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-b")
    described = describe_environment()
    assert described["slurm"] == {"SLURM_JOB_ID": "4711"}
    assert "s3cr3t" not in json.dumps(described)
    assert described["packages"]["torch"].startswith("2.")
    assert described["hardware"]["cores"] == len(os.sched_getaffinity(0))


def test_environment_names_the_commit_of_our_tree_and_of_no_other(tmp_path, monkeypatch):
    from pretrain.monitor import environment
    package = tmp_path / "somebody" / "site-packages" / "pretrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(["git", *who, "-C", str(tmp_path / "somebody"), *words], check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(environment, "__file__", str(package / "monitor" / "environment.py"))
    assert describe_environment()["source"] == {}
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert describe_environment()["source"] == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (package / "__init__.py").write_text("x")
    assert describe_environment()["source"]["modified"]
    assert Path(environment.__file__).parents[1] == package


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_file_on_a_full_disk_shows_no_traceback(capsys):
    setup_logging("info", Path("/dev/full"), 0)
    logging.getLogger("pretrain").info("said")
    setup_logging("info", None, 0)
    shown = capsys.readouterr().err
    assert "said" in shown
    assert "Traceback" not in shown
