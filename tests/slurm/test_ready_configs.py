"""configs/slurm: each file is a whole run and a job, and fits the machines that its name promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.config.cost import Hardware, step_time
from pretrain.config.load import load_run_config
from pretrain.config.memory import rank_memory
from pretrain.config.plan import make_plan
from pretrain.config.presets import configs_dir
from slurm.script import Job, Place, render

FILES = sorted((configs_dir() / "slurm").glob("*.yaml"))
H100 = Hardware(989.5e12, 0.5, 50e9, 3.35e12, 2e9)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_ready_config_is_a_job_of_the_size_in_its_name(path: Path) -> None:
    config = load_run_config(path).config
    assert config.name == path.stem
    assert path.read_text().startswith("# ")
    match = re.search(r"-(\d+)x(\d+)$", path.stem)
    assert match and config.slurm is not None
    assert (config.slurm.nodes, config.slurm.ranks_per_node) == (int(match[1]), int(match[2]))
    text = render(Job.of(config, Place(Path("/work"), "/python")))
    assert f"#SBATCH --nodes={match[1]}\n" in text
    assert f"--ntasks={config.slurm.ranks} " in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_ready_config_fits_gpus_of_80_gb_and_can_be_estimated(path: Path) -> None:
    config = load_run_config(path).config
    assert config.slurm is not None
    plan = make_plan(config, config.slurm.ranks, precision="bf16", device="cuda")
    assert rank_memory(config, plan.batch, "bf16", "cuda").device_bytes < 70e9
    step = step_time(config, plan, H100)
    assert 0 < step.least <= step.most
    assert config.slurm.save_before > plan.checkpoint_bytes / 1e9, "a save at 1 GB/s would not be done in time"


def test_the_jobs_that_were_asked_for_are_there() -> None:
    sizes = {path.stem: load_run_config(path).config for path in FILES}
    assert sizes["baseline-1b-4x8"].engine.zero_stage == 2
    assert sizes["baseline-7b-8x8"].engine.zero_stage == 3
    assert 6.5e9 < sizes["baseline-7b-8x8"].model.parameter_count().total < 7.1e9
    assert sizes["afrb-2048-1x8"].model.family == "afrb"
