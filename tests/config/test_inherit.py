"""A run that starts from another's weights takes what its config leaves open of the model from that run's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.inherit import told_of_model
from pretrain.config.load import diff_configs, dump_yaml, load_run_config
from pretrain.errors import ConfigError

BACKBONE = {"hf_config": {"model_type": "llama", "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
                          "tie_word_embeddings": False}, "weights": "models/somewhere"}
THEIRS = {"family": "afrb", "backbone": BACKBONE, "n_afrb": 2, "enable_pvm": True, "pvm_beta": 0.9,
          "disable_attn": True, "block_ramp": 7}


def write(folder: Path, name: str, model: dict[str, Any] | None, **train: Any) -> Path:
    """A config file; `model` None: without such a section."""
    values = {"name": name, "data": {"seq_len": 32, "source": {"kind": "synthetic", "vocab_size": 96}},
              "objective": {"name": "causal_lm"}, "train": train, **({} if model is None else {"model": model})}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{name}.yaml"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """The folder of a run, as far as configs go, with a checkpoint in it and an export beside it."""
    loaded = load_run_config(write(tmp_path, "teacher", THEIRS))
    for file in (tmp_path / "run/config.yaml", tmp_path / "export/training_config.yaml"):
        file.parent.mkdir()
        file.write_text(dump_yaml(loaded))
    (tmp_path / "run/checkpoints/step-7.f1").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-7.f1", "export"])
@pytest.mark.parametrize("own", [None, {"family": "afrb"}])
def test_a_model_that_is_not_described_is_the_one_of_the_weights(place: str, own: Any, teacher: Path) -> None:
    loaded = load_run_config(write(teacher, "pupil", own, init_from=str(teacher / place)))
    assert diff_configs(loaded.config.model, load_run_config(teacher / "run/config.yaml").config.model) == []
    assert loaded.origins["model.n_afrb"] == f"train.init_from ({teacher / place})"
    assert loaded.origins["data.stride"] == "default"
    inherited, differ = told_of_model(loaded.config.model, loaded.origins, teacher / place)
    assert {"model.n_afrb 2", "model.enable_pvm true", "model.pvm_beta 0.9"} <= set(inherited)
    assert not any("alpha" in each or "block_ramp" in each for each in inherited) and differ == []


def test_what_is_said_wins_and_is_told_where_it_differs(teacher: Path) -> None:
    file = write(teacher, "pupil", {"family": "afrb", "alpha": 0.04, "pvm_beta": 0.5, "block_ramp": 9},
                 init_from=str(teacher / "run"))
    loaded = load_run_config(file, ["model.n_afrb=1", "model.backbone.weights=models/other"])
    model = loaded.config.model
    assert (model.n_afrb, model.pvm_beta, model.block_ramp, model.enable_pvm) == (1, 0.5, 9, True)
    assert model.backbone.weights == "models/other" and model.backbone.hf_config["hidden_size"] == 16
    assert sorted(told_of_model(model, loaded.origins, teacher / "run")[1]) == [
        "model.n_afrb is 2 there, 1 here", "model.pvm_beta is 0.9 there, 0.5 here"], "but not how it trains"


def test_a_free_mapping_is_taken_as_a_whole_or_not_at_all(teacher: Path) -> None:
    mine = {key: value for key, value in BACKBONE["hf_config"].items() if key != "tie_word_embeddings"}
    file = write(teacher, "pupil", {"family": "afrb", "backbone": {"hf_config": mine}}, init_from=str(teacher / "run"))
    assert "tie_word_embeddings" not in load_run_config(file).config.model.backbone.hf_config


def test_another_family_and_a_folder_without_config_give_nothing(teacher: Path) -> None:
    other = load_run_config(write(teacher, "other", {"family": "baseline", "vocab_size": 96, "hidden_size": 16,
                                                     "num_heads": 2}, init_from=str(teacher / "run")))
    assert other.config.model.family == "baseline" and other.origins["model.num_layers"] == "default"
    for place in ("nowhere", "."):
        with pytest.raises(ConfigError, match="model"):
            load_run_config(write(teacher, "pupil", None, init_from=str(teacher / place)))
    alone = load_run_config(write(teacher, "alone", {"family": "afrb", "backbone": BACKBONE}, init_from="nowhere"))
    assert alone.config.model.n_afrb == 1
    assert told_of_model(alone.config.model, alone.origins, Path("nowhere")) == ([], [])


def test_keys_that_are_gone_stay_behind_and_the_written_config_needs_the_weights_no_more(teacher: Path) -> None:
    config = teacher / "run/config.yaml"
    stored = yaml.safe_load(config.read_text())
    stored["model"]["once_there"] = 3
    config.write_text(yaml.safe_dump(stored))
    loaded = load_run_config(write(teacher, "pupil", None, init_from=str(teacher / "run")))
    copy = teacher / "copy.yaml"
    copy.write_text(dump_yaml(loaded))
    config.unlink()
    assert diff_configs(load_run_config(copy), loaded) == []
