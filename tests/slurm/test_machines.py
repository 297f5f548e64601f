"""Bad machines: what nvidia-smi and the kernel say is read, judged, and acted on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_run_config
from pretrain.config.slurm import SlurmConfig
from pretrain.runfolder.layout import RunFolder
from slurm import nodecheck
from slurm.machines import ABSENT, SILENT, judge, read_results
from slurm.nodecheck import look, parse_gpus, parse_xids
from tests.slurm.cluster import SLOW_STEPS, Cluster, assert_undisturbed, payload_config, submitted, until

GOOD = "0, GPU-a, 0, No\n1, GPU-b, 0, No\n"


def slurm(**values: Any) -> SlurmConfig:
    return SlurmConfig.model_validate({"time": "2:00:00", "gpus_per_node": 2, **values})


def row(text: str = GOOD, **values: Any) -> dict[str, Any]:
    return {"gpus": parse_gpus(text), "xids": [], "disk": 1e9, "skew": 0.0, **values}


@pytest.mark.parametrize(("found", "why"), [
    (row(), None),
    (row("0, GPU-a, [N/A], [N/A]\n1, GPU-b, [Not Supported], [N/A]\n"), None),
    (row("0, GPU-a, 0, No\n"), "1 of 2 GPUs"),
    (row(""), "0 of 2 GPUs"),
    (row("0, GPU-a, 0, No\n1, GPU-b, 3, No\n"), "GPU 1: 3 uncorrected memory errors"),
    (row("0, GPU-a, 0, Yes\n1, GPU-b, 0, No\n"), "GPU 0: memory pages wait to be retired"),
    (row("0, GPU-a, 0, No\nUnable to determine the device handle for GPU 0000:3B:00.0: Unknown Error\n"),
     "nvidia-smi: Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error"),
    (row(gpus=None), "nvidia-smi does not answer"),
    (row(gpus=ABSENT), None),
    (row(xids=[{"device": "0000:3b:00", "xid": 79}]), "GPU 0000:3b:00: Xid 79, fallen off the bus"),
    (row(xids=[{"device": "0000:3b:00", "xid": 13}]), None),
    (row(disk_error="/run: Permission denied"), "cannot write to the run folder (/run: Permission denied)"),
])
def test_a_machine_is_judged_by_what_it_says_of_itself(found: dict[str, Any], why: str | None) -> None:
    assert judge(slurm(), ["n1", "n2"], {"n1": row(), "n2": found}).bad == ({} if why is None else {"n2": why})


def test_a_machine_that_says_nothing_is_bad() -> None:
    assert judge(slurm(), ["n1", "n2"], {"n1": row()}).bad == {"n2": SILENT}


def test_what_is_no_reason_is_a_note() -> None:
    full = row(disk=1e6, free=0)
    found = judge(slurm(), ["n1", "n2", "n3"], {"n1": row(skew=-30.0), "n2": row(xids=None), "n3": full})
    assert found.bad == {}
    assert found.notes == {"n1": "clock -30 s off",
                           "n3": "1.0 MB/s to the run folder; 0.00 GB are free where the run folder is",
                           "n2": "the kernel's log may not be read: Xid events are not known"}


def test_a_slow_device_and_a_slow_link_are_told_from_their_neighbours() -> None:
    def fast(**values: Any) -> dict[str, Any]:
        return row(**{"flops": [600e12, 600e12], "links": [50e9, 50e9], **values})

    machines = {"n1": fast(links=[50e9, 5e9]), "n2": fast(links=[5e9, 5e9]), "n3": fast(links=[5e9, 50e9]),
                "n4": fast(flops=[600e12, 300e12])}
    found = judge(slurm(checks="full"), list(machines), machines)
    assert set(found.bad) == {"n2", "n4"}  # n1 and n3 each have one good neighbour
    assert found.bad["n4"] == "device 1: 300 TFLOP/s, the median is 600"
    stuck = judge(slurm(checks="full"), ["n1", "n2"], {"n1": fast(), "n2": row()})
    assert stuck.bad == {"n2": "its matrix product or all-reduce did not end"}


def test_xids_are_read_from_the_kernels_log() -> None:
    log = ("[  100.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
           "[90000.1] NVRM: Xid (PCI:0000:5e:00): 48, pid='<unknown>', name=<unknown>\n"
           "[90001.1] NVRM: Xid (PCI:0000:5e:00): 48, pid='<unknown>', name=<unknown>\n"
           "[90002.0] NVRM: Xid (0000:5f:00): 31, pid=7\n[90003.0] eth0: link up\n")
    assert parse_xids(log, 90100.0, 3600.0) == [{"device": "0000:5e:00", "xid": 48},
                                                {"device": "0000:5f:00", "xid": 31}]
    assert len(parse_xids(log, 90100.0, 100_000.0)) == 3


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_programs_are_asked_and_a_machine_that_hangs_is_not_waited_for(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    config = payload_config(tmp_path, 10, gpus_per_node=2, nodes=2).config
    folder = RunFolder.create(tmp_path / "runs/run")
    folder.slurm_dir.mkdir()
    program(tmp_path / "bin", "nvidia-smi", f"printf '%s' '{GOOD}'")
    program(tmp_path / "bin", "dmesg", "exit 1")
    found = look(config, folder)
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-a", "GPU-b"]
    assert found["xids"] is None
    assert found["disk"] > 0
    assert abs(found["skew"]) < 5
    assert not list(folder.slurm_dir.glob("*.tmp"))
    monkeypatch.setattr(nodecheck, "_ROOM", 2**60)
    found = look(config, folder)
    assert "disk" not in found
    assert found["free"] > 0
    monkeypatch.setattr(nodecheck, "_PROGRAM_S", 0.2)
    program(tmp_path / "bin", "nvidia-smi", "exec sleep 20")
    assert look(config, folder)["gpus"] is None


def test_a_torn_result_is_none(tmp_path: Path) -> None:
    (tmp_path / "machine-n1.json").write_text('{"node": "n1"}')
    (tmp_path / "machine-n2.json").write_text('{"node"')
    assert list(read_results(tmp_path)) == ["n1"]


@pytest.mark.slow
def test_a_bad_machine_is_left_out_and_the_job_goes_on_elsewhere(cluster: Cluster, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """n1 says that one of its two GPUs has uncorrected errors."""
    (tmp_path / "bin").mkdir()
    bad, good = GOOD.replace("GPU-b, 0", "GPU-b, 7"), GOOD
    program(tmp_path / "bin", "nvidia-smi", f'[ "$SLURMD_NODENAME" = n1 ] && printf "{bad}" || printf "{good}"')
    env = {**SLOW_STEPS, "PATH": f"{tmp_path / 'bin'}:{cluster.environment['PATH']}"}
    loaded = payload_config(tmp_path, 30, env=env, nodes=2)
    path = tmp_path / "run.yaml"
    # The cluster has no GPUs to give: only the check is told of two.
    trial = submitted(cluster, tmp_path, loaded, monkeypatch)
    cluster.run("scancel", trial.number)
    cluster.wait(trial.number, "CANCELLED")
    until(lambda: not cluster.run("squeue", "-h", "-t", "R,CG", "-j", trial.number, check=False).strip())
    script = trial.root / "slurm/job.sbatch"
    (trial.root / "slurm/starts.jsonl").unlink(missing_ok=True)
    frozen = trial.root / "slurm/config.yaml"
    frozen.write_text(frozen.read_text().replace("gpus_per_node: 0", "gpus_per_node: 2"))
    assert load_run_config(frozen).config.slurm is not None
    assert path.exists()
    trial.numbers[:] = [cluster.run("sbatch", "--parsable", str(script)).strip()]
    job = trial.end()
    assert_undisturbed(trial, 30)
    assert job.restarts == 1
    first, second = trial.history
    assert first.reason == "bad machines: n1 (GPU 1: 7 uncorrected memory errors)"
    assert (first.nodes, second.nodes) == ("n[1-2]", "n[2-3]")
    assert first.excluded == ("n1",)
