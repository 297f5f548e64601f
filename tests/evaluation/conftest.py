"""A small prepared dataset and run configs over it, shared by the tests of the evaluation room."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from pretrain.config.load import dump_yaml
from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.data.open import open_training
from pretrain.models.base import BuildContext
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest, write_text_atomic

TEXT = """def return self import class value name for in if not None path file open read write data index list key
          error raise with as try except str int len range print"""
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """About 60k tokens of word salad with second-order structure, in train and val."""
    root = tmp_path_factory.mktemp("evaluation-data")
    rng = random.Random(0)
    follow = {(a, b): rng.sample(WORDS, 3) for a in WORDS for b in WORDS}
    text = root / "text"
    text.mkdir()
    for i in range(120):
        words = [rng.choice(WORDS), rng.choice(WORDS)]
        for _ in range(rng.randrange(20, 400)):
            words.append(rng.choice(follow[words[-2], words[-1]]))
        (text / f"{i:03d}.txt").write_text(" ".join(words) + "\n")
    prepare(PrepConfig.model_validate({
        "out": str(root / "set"), "sources": [{"kind": "text", "name": "salad", "path": str(text)}],
        "splits": {"val": 0.15}, "tokenizer": {"vocab_size": 400}, "block_tokens": 512, "workers": 1}))
    return root / "set"


@pytest.fixture
def run_config(dataset, tmp_path) -> RunConfig:
    """A tiny Llama on that dataset."""
    return make_config(dataset, tmp_path / "runs")


def make_config(dataset: Path, runs: Path, **changes) -> RunConfig:
    values = {
        "name": "tiny", "runs_dir": str(runs),
        "model": {"family": "baseline", "body": "llama", "vocab_size": 400, "hidden_size": 32, "num_layers": 2,
                  "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128},
        "data": {"seq_len": 64, "source": {"kind": "shards", "path": str(dataset)}},
        "objective": {"name": "causal_lm"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    return RunConfig.model_validate({**values, **changes})


def make_run(config: RunConfig, *, step=3, fence=1, seed=0, controls=None):
    """A run folder with one ZeRO-0 checkpoint of a seeded model, as the engine lays it out. Returns (run, model)."""
    family = resolve(FAMILIES, config.model.family, "model.family")
    model = family.build(config.model, BuildContext(seed=seed)).eval()
    folder = RunFolder.create(Path(config.runs_dir) / config.name)
    write_text_atomic(folder.config_file, dump_yaml(config))
    path = folder.final_checkpoint(step, fence).path
    (path / "deepspeed").mkdir(parents=True)
    torch.save({"module": model.state_dict(), "optimizer": {"state": {}}, "global_steps": step,
                "pretrain": {"optimizer_parameters": [[name for name, _ in model.named_parameters()]]}},
               path / "deepspeed" / "mp_rank_00_model_states.pt")
    save_file({}, path / "extra.safetensors")
    batch = config.batch.resolve(1)
    probe = open_training(config, batch).samples(2)
    save_file({"input_ids": probe["input_ids"].contiguous()}, path / "probe.safetensors")
    (path / "probe.json").write_text(json.dumps({"figures": {}, "controls": controls or {}}))
    (path / "state.json").write_text('{"health": {"bad_steps": {"skipped": [1]}}}')
    Manifest.collect(path, {}, step=step, k=step + 1, fence=fence, world=1, stage=0, dtype="fp32").write(path)
    return folder, model


@pytest.fixture
def checkpointed():
    """`make_run`."""
    return make_run


@pytest.fixture
def run(run_config):
    return make_run(run_config)


@pytest.fixture
def run_with_controls(run_config):
    """A run whose family passed controls to its forward."""
    return make_run(run_config, controls={"ramp": 0.5})
