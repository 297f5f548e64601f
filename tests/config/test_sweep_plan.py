"""What runs a sweep consists of."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config.load import load_run_config, load_yaml_model
from pretrain.config.presets import configs_dir
from pretrain.config.sweep import SweepConfig
from pretrain.errors import ConfigError


def config(**values: Any) -> SweepConfig:
    return SweepConfig.model_validate({"name": "s", "presets": ["demo"], **values})


def test_every_seed_has_every_row_before_the_next_seed_begins() -> None:
    found = config(presets={"a": "demo", "b": "baseline-27m"}, variants={"x": [], "y": ["optim.lr=1e-3"]}, seeds=[1, 2])
    assert found.rows == ["a/x", "a/y", "b/x", "b/y"]
    assert [(run.row, run.seed) for run in found.runs()] == [(row, seed) for seed in (1, 2) for row in found.rows]
    assert len({run.name for run in found.runs()}) == 8


def test_a_run_loads_with_its_seed_its_folder_and_its_variant_above_the_common_values() -> None:
    sweep = config(sets=["optim.lr=5e-4"], variants={"low": [], "high": ["optim.lr=1e-2"]}, seeds=[7], nproc=3)
    low, high = (load_run_config(run.target, run.sets).config for run in sweep.runs())
    assert (low.optim.lr, high.optim.lr) == (5e-4, 1e-2)
    assert (low.name, low.runs_dir, low.seed, low.launch.nproc) == ("low-s7", "runs/s", 7, 3)


def test_a_seed_can_be_named_in_values_and_in_evaluations() -> None:
    sweep = config(sets=["objective.z_loss=0.{seed}"], seeds=[3], evaluate=["--task needle --null 'a b/null-s{seed}'"])
    (run,) = sweep.runs()
    assert load_run_config(run.target, run.sets).config.objective.z_loss == 0.3
    assert sweep.evaluations(run) == [["--task", "needle", "--null", "a b/null-s3"]]


def test_one_preset_without_variants_is_its_own_row() -> None:
    assert config().rows == ["demo"]
    assert config().compared_with == "demo"
    assert config(variants={"x": [], "y": []}, reference="y").compared_with == "y"


@pytest.mark.parametrize(("values", "told"), [
    ({"seeds": [1, 1]}, "not a replication"),
    ({"variants": {"a/b": []}}, "part of a folder name"),
    ({"variants": {"": [], "x": []}}, "has no label"),
    ({"variants": {"x": [], "y": []}, "reference": "z"}, "is no row"),
    ({"presets": ["demo", "other/demo.yaml"]}, "same name"),
    ({"evaluate": ["--task 'needle"]}, "cannot be split"),
])
def test_what_makes_no_table_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=told):
        config(**values)


def test_every_sweep_file_names_runs_that_are_there_or_will_be() -> None:
    """Its runs load, its nulls are trained by the command in its head, and where it goes on is a run of another one."""
    files = {file: load_yaml_model(SweepConfig, file)[0] for file in sorted((configs_dir() / "sweeps").glob("*.yaml"))}
    assert len(files) >= 6
    made = {f"{sweep.runs_dir}/{sweep.name}/{run.name}": run.seed for sweep in files.values() for run in sweep.runs()}
    for file, sweep in files.items():
        assert sweep.name == file.stem and sweep.seeds == [41, 42, 43]
        for run in sweep.runs():
            loaded = load_run_config(run.target, run.sets).config
            assert loaded.seed == run.seed == loaded.data.source.seed
            if loaded.train.init_from is not None:
                assert made[loaded.train.init_from] == run.seed
            for words in (words for words in sweep.evaluations(run) if "--null" in words):
                null = words[words.index("--null") + 1].removeprefix("runs/")
                assert f"name={null}" in file.read_text() or f"train {null}" in file.read_text()
