"""The sbatch file as text: golden files, shellcheck, and values that try to become commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.load import load_run_config
from pretrain.config.slurm import parse_time
from pretrain.errors import ConfigError, ConfigErrors
from slurm.script import Job, Place, render
from tests.slurm.cluster import CONFIG

GOLDEN = Path(__file__).with_name("golden")
PLACE = Place(Path("/home/ada/work"), "/home/ada/venv/bin/python")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"slurm": {"time": "30", "save_before": 60}},
    "gpus": {
        "name": "m1b", "runs_dir": "/scratch/ada/runs", "batch": {"global_batch_size": 512},
        "slurm": {"time": "2-00:00:00", "nodes": 4, "gpus_per_node": 8, "cpus": 12, "mem": "0", "partition": "gpu",
                  "account": "nlp", "qos": "long", "constraint": "h100&ib", "exclude": ["n[3-4]", "n17"],
                  "reservation": "week-12", "dependency": "afterok:123:124,singleton",
                  "mail": {"user": "ada@example.org", "events": ["END", "FAIL"]},
                  "modules": ["cuda/12.4", "nccl"], "env": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's $HOME; `id`"}}},
    "torchrun": {"batch": {"global_batch_size": 8},
                 "slurm": {"time": "4:00:00", "nodes": 2, "gpus_per_node": 4, "cpus": 8, "launcher": "torchrun"}},
    "chain": {"slurm": {"time": "1-0", "nodes": 2, "restart": "chain", "max_restarts": 3}},
    "fewer": {"batch": {"global_batch_size": 16}, "slurm": {"time": "4:00:00", "nodes": 4, "min_nodes": 2}},
    "apptainer": {"batch": {"global_batch_size": 8},
                  "slurm": {"time": "4:00:00", "nodes": 2, "gpus_per_node": 4, "python": "/opt/venv/bin/python",
                            "container": {"runtime": "apptainer", "image": "/images/pretrain.sif",
                                          "mounts": ["/data", "/scratch:/mnt:ro"]}}},
    "pyxis": {"batch": {"global_batch_size": 8},
              "slurm": {"time": "4:00:00", "nodes": 2, "gpus_per_node": 4, "python": "/opt/venv/bin/python",
                        "container": {"runtime": "pyxis", "image": "registry.example.org#lab/pretrain:1.2"}}},
}


def text_of(folder: Path, **changes: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "name": "tiny", **changes}))
    return render(Job.of(load_run_config(path).config, PLACE))


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_golden_one(name: str, tmp_path: Path) -> None:
    """RENEW_GOLDEN=1 writes the files anew; read the difference before you commit it."""
    text = text_of(tmp_path, **CASES[name])
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: it is in the extra [test]")
    files = [*GOLDEN.glob("*.sbatch"), Path(__file__).with_name("cluster.sh")]
    done = subprocess.run([program, *map(str, files)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_it(name: str) -> None:
    done = subprocess.run(["bash", "-n", GOLDEN / f"{name}.sbatch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


EVIL = ("x; touch PWNED", "$(touch PWNED)", "`touch PWNED`", "x\n#SBATCH --uid=0", "x\ntouch PWNED",
        "'; touch PWNED; '", '"; touch PWNED; "', "x --wrap=id", "\\", "\\'; touch PWNED #", "a b", "#x", "\x00",
        "é\u2028x", "%j", "${IFS}x", "-x", "--uid=0")


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "reservation", "dependency", "mem",
                                 "time", "exclude", "modules", "mail", "image", "mounts"])
def test_what_is_no_plain_word_does_not_get_into_the_header(key: str, tmp_path: Path) -> None:
    for evil in EVIL[:-2] if key == "mounts" else EVIL:  # with a slash in front, the last two are mere paths
        value: dict[str, Any] = {key: evil}
        if key in ("exclude", "modules"):
            value = {key: [evil]}
        elif key == "mail":
            value = {"mail": {"user": evil}}
        elif key in ("image", "mounts"):
            container = {"runtime": "apptainer", "image": "/a.sif", key: evil if key == "image" else [f"/{evil}"]}
            value = {"container": container, "python": "/p"}
        with pytest.raises(ConfigErrors) as caught:
            text_of(tmp_path, slurm={"time": "30", "save_before": 60, **value})
        assert "slurm." in str(caught.value)


@pytest.mark.parametrize("path", ["runs dir", "runs%j", "runs\nx", 'runs"', "runs;id", "$(id)"])
def test_a_run_folder_that_the_header_cannot_hold_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs_dir: .*cannot stand in the header of a job"):
        text_of(tmp_path, runs_dir=path, slurm={"time": "30", "save_before": 60})
    place = Place(Path("/home/ada lovelace"), "python")
    config = load_run_config(tmp_path / "config.yaml").config
    with pytest.raises(ConfigError, match="cannot stand in the header"):
        Job.of(config, place)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_evil_values_of_the_body_stay_values(launcher: str, tmp_path: Path) -> None:
    """The script is run, with programs that only say what they were given."""
    evil = [value for value in EVIL if value.isprintable()]
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "py'; touch PWNED; $(touch PWNED) `touch PWNED` \"thon"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep ^EVIL\n')
    python.chmod(0o755)
    for program in ("srun", "scontrol", "squeue", "sinfo"):
        path = tmp_path / "bin" / program
        path.write_text('#!/bin/bash\n[ "${0##*/}" != srun ] || { printf "%s\\n" "$@"; env | grep ^EVIL; }\n')
        path.chmod(0o755)
    env = {f"EVIL_{number}": value for number, value in enumerate(evil)}
    text = text_of(tmp_path, slurm={"time": "30", "save_before": 60, "env": env, "python": str(python),
                                    "launcher": launcher})
    (tmp_path / "job.sbatch").write_text(text)
    done = subprocess.run(
        ["bash", "job.sbatch"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "4"})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "PWNED").exists()
    for name, value in env.items():
        assert f"{name}={value}\n" in done.stdout
    assert f"{python}\n" in done.stdout  # srun got it as one word


def test_names_that_the_launcher_owns_are_refused(tmp_path: Path) -> None:
    for name in ("RANK", "MASTER_PORT", "SLURM_JOB_ID", "SBATCH_X", "A B", "1A", "A;id", ""):
        with pytest.raises(ConfigErrors, match=r"slurm\.env"):
            text_of(tmp_path, slurm={"time": "30", "save_before": 60, "env": {name: "x"}})


@pytest.mark.parametrize(("slurm", "message"), [
    (None, "slurm: is missing; a section with at least a time makes this run a job"),
    ({}, "slurm.time: is missing"),
    ({"time": "5"}, "slurm.save_before: 300 s before a limit of 300 s leave no time to train"),
    ({"time": "12-"}, '"12-" is no time limit'),
    ({"time": "30", "nodes": 5}, "batch.global_batch_size: 12 is not a multiple of 5 ranks; use 10 or 15"),
    ({"time": "30", "nodes": 2, "min_nodes": 2}, "slurm.min_nodes: 2 is not below slurm.nodes 2"),
    ({"time": "30", "container": {"runtime": "pyxis", "image": "a"}}, "slurm.python: is missing"),
    ({"time": "30", "partitoin": "x"}, 'slurm.partitoin: is no key of this section (did you mean "partition"?)'),
], ids=lambda value: "" if isinstance(value, str) else str(value))
def test_what_cannot_be_a_job_is_said_in_one_line(slurm: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        text_of(tmp_path, slurm=slurm)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [
    ("30", 1800), ("30:15", 1815), ("1:02:03", 3723), ("2-03", 183600), ("1-02:03", 93780), ("1-02:03:04", 93784),
    ("0", 0), ("", 0), ("1-", 0), ("a", 0), ("1:2:3:4", 0)])
def test_time_limits(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds
