"""A small prepared dataset and run configs over it, shared by the tests of the evaluation room."""

import random
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from pretrain.config.run import RunConfig

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
