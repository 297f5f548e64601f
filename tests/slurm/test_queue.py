"""What the queue says, in the JSON of old and new Slurm; submission, status, logs, cancelling beside fake programs."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pretrain.cli.slurm import app
from pretrain.errors import UserError
from pretrain.monitor.rows import encode
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status
from slurm import client
from slurm.follow import follow
from slurm.history import note, read_submissions
from slurm.jobs import parse_jobs
from slurm.script import Place, frozen_config, script_file
from slurm.submit import submit
from tests.slurm.cluster import payload_config

OLD = {"job_id": 12, "name": "m1b", "user_name": "ada", "job_state": "RUNNING", "state_reason": "None",
       "nodes": "n[1-4]", "node_count": 4, "restart_cnt": 2, "partition": "gpu", "submit_time": 100,
       "start_time": 200, "end_time": 900, "time_limit": 10, "comment": "pretrain:/scratch/ada/runs/m1b"}
"""22.05: plain numbers, a state as text (seen on a cluster)."""


def number(value: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": value}


BETWEEN = {**OLD, "node_count": number(4), "time_limit": number(10)}
"""23.02: numbers that may be unset are objects."""
NEW = {**BETWEEN, "job_state": ["RUNNING"], "submit_time": number(100), "start_time": number(200),
       "end_time": number(900)}
"""23.11 and later: times too, and states are lists."""


@pytest.mark.parametrize("row", [OLD, BETWEEN, NEW], ids=["22.05", "23.02", "23.11"])
def test_jobs_are_the_same_whatever_slurm_wrote_them(row: dict[str, Any]) -> None:
    job, = parse_jobs(json.dumps({"meta": {}, "jobs": [row], "errors": []}))
    assert (job.id, job.state, job.nodes, job.node_count, job.restarts) == ("12", "RUNNING", "n[1-4]", 4, 2)
    assert (job.submitted, job.started, job.ends, job.time_limit_minutes) == (100, 200, 900, 10)
    assert (job.root, job.reason, job.live) == ("/scratch/ada/runs/m1b", "", True)


def test_states_that_are_several() -> None:
    def state(value: Any) -> str:
        return parse_jobs(json.dumps({"jobs": [{**NEW, "job_state": value}]}))[0].state

    assert state(["RUNNING", "COMPLETING"]) == "COMPLETING"
    assert state(["PENDING", "REQUEUED"]) == "REQUEUED"
    assert state(["CANCELLED"]) == "CANCELLED"
    assert state("NODE_FAIL") == "NODE_FAIL"


def test_what_is_unset_or_infinite_is_not_known() -> None:
    unset = {"set": False, "infinite": False, "number": 0}
    row = {**NEW, "time_limit": {"set": True, "infinite": True, "number": 0}, "start_time": unset, "comment": ""}
    job, = parse_jobs(json.dumps({"jobs": [row]}))
    assert (job.time_limit_minutes, job.started, job.root) == (None, None, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": 3}', '{"jobs": [{}]}', '{"jobs": [{"job_id": 1}]}',
                                  '{"jobs": [{"job_id": 1, "job_state": []}]}'])
def test_an_answer_that_is_none_is_said_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="squeue --json: its answer cannot be read"):
        parse_jobs(text)


class Queue:
    """Programs of Slurm that keep a queue in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.show([])

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def show(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "queue.json").write_text(json.dumps({"jobs": rows}))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    queue = Queue(folder)
    queue.program("squeue", f"cat {folder}/queue.json")
    queue.program("sbatch", f'echo "sbatch $*" >>{folder}/calls; wc -l <{folder}/calls')
    queue.program("scancel", f'echo "scancel $*" >>{folder}/calls')
    return queue


def test_submitting_freezes_the_config(queue: Queue, tmp_path: Path) -> None:
    loaded = payload_config(tmp_path, 10)
    job, numbers = submit(loaded, Place(tmp_path, "/python"))
    assert numbers == ["1"]
    assert queue.calls == [f"sbatch --parsable {tmp_path}/runs/run/slurm/job.sbatch"]
    assert script_file(job.folder).read_text().startswith("#!/bin/bash\n# Run run on 4 x 1 ranks")
    (tmp_path / "run.yaml").write_text("changed: afterwards")
    assert "seq_len: 16" in frozen_config(job.folder).read_text()
    assert [sent.jobs for sent in read_submissions(job.folder)] == [("1",)]


def test_a_chain_is_submitted_link_by_link(queue: Queue, tmp_path: Path) -> None:
    _, numbers = submit(payload_config(tmp_path, 10, restart="chain", max_restarts=2), Place(tmp_path, "/python"))
    assert numbers == ["1", "2", "3"]
    assert [call.split()[2] for call in queue.calls[1:]] == ["--dependency=afterany:1", "--dependency=afterany:2"]


def test_a_run_is_not_submitted_twice_by_mistake(queue: Queue, tmp_path: Path) -> None:
    loaded = payload_config(tmp_path, 10)
    queue.show([{**OLD, "comment": f"pretrain:{tmp_path}/runs/run"}])
    with pytest.raises(UserError, match="job 12 of this run waits or runs already"):
        submit(loaded, Place(tmp_path, "/python"))
    assert queue.calls == []
    assert submit(loaded, Place(tmp_path, "/python"), again=True)[1] == ["1"]
    queue.show([{**OLD, "job_state": "FAILED", "comment": f"pretrain:{tmp_path}/runs/run"}])
    assert submit(loaded, Place(tmp_path, "/python"))[1] == ["2"]


def test_what_sbatch_refuses_is_one_line(queue: Queue, tmp_path: Path) -> None:
    queue.program("sbatch", 'echo "sbatch: error: lua: hello" >&2; echo "sbatch: error: invalid partition" >&2; exit 1')
    with pytest.raises(UserError, match=r"^sbatch --parsable: sbatch: error: invalid partition$"):
        submit(payload_config(tmp_path, 10), Place(tmp_path, "/python"))
    queue.program("sbatch", "echo nonsense")
    with pytest.raises(UserError, match="where the number of a job was expected"):
        submit(payload_config(tmp_path, 10), Place(tmp_path, "/python"))


def test_a_machine_without_slurm_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue: not found on PATH; is this a machine of the cluster"):
        client.squeue()


@pytest.fixture
def trained(queue: Queue, tmp_path: Path) -> RunFolder:
    """A run folder in which a second start trains, and its job in the queue."""
    job, _ = submit(payload_config(tmp_path, 1000), Place(tmp_path, "/python"))
    folder = job.folder
    note(folder, "begin", "12", 0, nodes="n[1-4]", begun=1.0, step=0, fence=0)
    note(folder, "end", "12", 0, ended=2.0, reason="time limit", code=85, saved=300, action="requeue")
    note(folder, "begin", "12", 1, nodes="n[1-4]", begun=3.0, step=300, fence=1)
    Status(2, "running", step=400, total_steps=1000).write(folder)
    row = {"step": 412, "k": 412, "loss": 2.5, "tokens_per_second": 12345.0, "eta_seconds": 7200.0}
    folder.metrics_jsonl.write_bytes(encode(row, 2))
    for name, text in (("12.out", "start 1\nstart 2\n"), ("12-0/rank-0.log", "old\n"),
                       ("12-1/rank-0.log", "new\nunfinished"), ("12-1/rank-3.log", "three\n")):
        path = folder.slurm_dir / "log" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    queue.show([{**NEW, "comment": f"pretrain:{folder.root}"}])
    return folder


def pretrain(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("target", ["12", "runs/run", "run.yaml"])
def test_status_shows_job_and_run_together(target: str, trained: RunFolder) -> None:
    text = pretrain("status", target)
    for row in ("job       12", "state     RUNNING", "machines  n[1-4]", "step      412 of 1,000", "loss      2.5000",
                "tokens/s  12,345", "restarts  2", "to go     2.0 h",
                "start 1   job 12.0 on n[1-4], from step 0 to step 300: time limit",
                "start 2   job 12.1 on n[1-4], from step 300 under way"):
        assert row in text
    shown = json.loads(pretrain("status", target, "--json"))
    assert (shown["step"], shown["loss"], shown["eta_seconds"]) == (412, 2.5, 7200.0)
    assert [start["reason"] for start in shown["history"]] == ["time limit", ""]


def test_a_job_that_waits_says_why(queue: Queue, trained: RunFolder) -> None:
    queue.show([{**NEW, "job_state": ["PENDING"], "state_reason": "Resources", "nodes": "",
                 "comment": f"pretrain:{trained.root}"}])
    note(trained, "end", "12", 1, ended=4.0, reason="preempted", saved=412, action="requeue")
    shown = json.loads(pretrain("status", "12", "--json"))
    assert (shown["state"], shown["why"], shown["eta_seconds"]) == ("PENDING", "Resources; last start: preempted", None)


def test_a_run_whose_job_has_left_the_queue_is_told_from_its_folder(queue: Queue, trained: RunFolder) -> None:
    queue.show([])
    Status(2, "diverged", 4, step=412, total_steps=1000).write(trained)
    shown = json.loads(pretrain("status", "runs/run", "--json"))
    assert (shown["state"], shown["job"], shown["nodes"]) == ("diverged", "12", "n[1-4]")
    Status(2, "running", step=412).write(trained)  # and nobody holds the lease
    assert json.loads(pretrain("status", "runs/run", "--json"))["state"] == "dead"


def test_list_shows_our_jobs_only(queue: Queue, trained: RunFolder) -> None:
    queue.show([{**NEW, "comment": f"pretrain:{trained.root}"}, {**NEW, "job_id": 13, "comment": "somebody's"},
                {**NEW, "job_id": 14, "comment": "pretrain:/gone"}])
    shown = json.loads(pretrain("list", "--json"))
    assert [row["name"] for row in shown] == ["run", "gone"]
    assert "RUNNING" in pretrain("list")
    queue.show([{**OLD, "job_state": "COMPLETED", "comment": f"pretrain:{trained.root}"}])
    assert pretrain("list") == "no jobs\n"
    assert [row["name"] for row in json.loads(pretrain("list", "--all", "--json"))] == ["run"]


def test_targets_that_are_none_are_said_in_one_line(queue: Queue, trained: RunFolder) -> None:
    queue.show([{**NEW, "job_id": 13, "comment": "x"}])
    for target, message in (("99", "the queue does not know it"), ("13", "is none of `pretrain slurm`"),
                            ("nothing", "no preset")):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["status", target], catch_exceptions=False)


def test_logs_are_of_the_newest_start_and_by_rank(trained: RunFolder) -> None:
    assert pretrain("logs", "runs/run").splitlines() == ["job    | start 1", "job    | start 2", "rank 0 | new",
                                                         "rank 0 | unfinished"]
    assert pretrain("logs", "runs/run", "--rank", "3") == "three\n"


def test_following_goes_on_into_the_next_start_and_ends_with_the_job(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.follow._EVERY_S", 0.01)
    monkeypatch.setattr("slurm.follow._ASK_EVERY_S", 0.0)
    files = [("", tmp_path / "a")]
    alive = [True]

    def write() -> None:
        for name, text in (("a", "one\ntw"), ("a", "one\ntwo\n"), ("b", "three")):
            time.sleep(0.1)
            (tmp_path / name).write_text(text)
            files[0] = ("", tmp_path / name)
        time.sleep(0.1)
        alive[0] = False

    threading.Thread(target=write).start()
    assert list(follow(lambda: list(files), lambda: alive[0], forever=True)) == ["one", "two", "three"]


def test_cancelling_lets_a_run_save_first(queue: Queue, trained: RunFolder) -> None:
    queue.show([{**NEW, "comment": f"pretrain:{trained.root}"},
                {**NEW, "job_id": 13, "job_state": ["PENDING"], "comment": f"pretrain:{trained.root}"}])
    assert pretrain("cancel", "12").splitlines() == [
        "job 13: cancelled", "job 12: asked to save and stop; --now ends it at once"]
    assert queue.calls[-1] == "scancel 13"
    assert (trained.control_dir / "stop").exists()
    pretrain("cancel", "runs/run", "--now")
    assert queue.calls[-1] == "scancel 12 13"


def test_render_prints_what_submit_would_write_and_touches_nothing(queue: Queue, tmp_path: Path) -> None:
    payload_config(tmp_path, 10)
    text = pretrain("render", "run.yaml")
    assert not (tmp_path / "runs").exists()
    path = Path(pretrain("render", "run.yaml", "--write").strip())
    assert path.read_text() == text
    assert frozen_config(RunFolder(tmp_path / "runs/run")).exists()
    assert queue.calls == []
