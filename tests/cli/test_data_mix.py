"""`pretrain data mix` against the samples that the order of the run really draws."""

import json
import sys

import numpy as np
import pytest
import yaml

from pretrain.cli.data_mix import mix_of
from pretrain.cli.main import main
from pretrain.config.load import load_run_config
from pretrain.data.open import open_training

PARTS = [{"source": {"kind": "synthetic", "samples": samples, "vocab_size": 50}} for samples in (700, 200, 50)]


@pytest.fixture
def config(tmp_path):
    def make(**source):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({
            "extends": "demo", "train": {"length": "40 steps"}, "launch": {"nproc": 1},
            "data": {"seq_len": 64, "source": {"kind": "mixture", "parts": PARTS, "period": 20} | source},
            "batch": {"global_batch_size": 10, "micro_batch_size": 10}}))
        return path
    return make


@pytest.mark.parametrize("source", [
    {}, {"temperature": 0.5}, {"parts": [p | {"weight": w} for p, w in zip(PARTS, (1, 2, 2), strict=True)]},
    {"curriculum": [{"steps": 10, "weights": [1, 0, 0]}, {"steps": 20, "weights": [1, 1, 0]}, {"weights": [0, 1, 3]}]}])
def test_what_it_says_is_what_the_order_draws(config, source):
    loaded = load_run_config(config(**source)).config
    steps, parts = mix_of(loaded)
    order = open_training(loaded, loaded.batch.resolve(1)).order
    drawn = np.concatenate([order.positions(k, 0, 10)[0] for k in range(steps)])
    assert steps == 40
    assert [part.drawn for part in parts] == np.bincount(drawn, minlength=3).tolist()
    assert [part.samples for part in parts] == [700, 200, 50]
    assert [part.epochs for part in parts] == [pytest.approx(p.drawn / p.samples) for p in parts]
    assert sum(part.share for part in parts) == pytest.approx(1)


def test_it_prints_a_table_and_json(config, monkeypatch, capsys):
    path = config(temperature=0.0)
    for words in ([], ["--dry-run", "--json"]):
        monkeypatch.setattr(sys, "argv", ["pretrain", "data", "mix", str(path), *words])
        with pytest.raises(SystemExit) as left:
            main()
        out = capsys.readouterr().out
        assert not left.value.code
        if words:
            assert json.loads(out)["parts"][2]["samples"] == 50
        else:
            assert "without end" not in out and "44,800" in out and "40 steps of 10 samples of 64 tokens" in out
