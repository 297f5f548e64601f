"""`pretrain data mix` against the samples that the order of the run really draws."""

import json
import sys

import numpy as np
import pytest
import yaml

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
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


def test_tokens_are_those_of_the_datasets_and_one_that_lies_elsewhere_has_an_end(config, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(90)))
    (tmp_path / "rows.csv").write_text("query,positive\n" + "".join(f"what is {i},it is {i}\n" for i in range(50)))
    made = {name: prepare(PrepConfig.model_validate({
        "out": str(tmp_path / name), "sources": [{"name": "s", "path": str(tmp_path / file), "kind": kind}],
        "tokenizer": {"vocab_size": 300}, "workers": 1, "splits": {"val": 0.1}}))
        for name, file, kind in (("docs", "texts.jsonl", "jsonl"), ("pairs", "rows.csv", "pair_table"))}
    shards = {"kind": "shards", "path": str(made["docs"].folder)}
    remote = {"kind": "remote", "url": f"pipe:cat {made['docs'].folder}/{{name}}", "cache": str(tmp_path / "cache")}

    def told(seq_len, stride, source):
        path = tmp_path / "one.yaml"
        path.write_text(yaml.safe_dump({
            "extends": "demo", "train": {"length": "2 steps"}, "launch": {"nproc": 1},
            "batch": {"global_batch_size": 10, "micro_batch_size": 10},
            "data": {"seq_len": seq_len, "stride": stride, "source": source}}))
        return mix_of(load_run_config(path).config)[1]
    tokens = made["docs"].splits["train"].tokens
    for stride in (None, 8):
        there, = told(32, stride, shards)
        assert (there.samples, there.tokens) == ((tokens - 33) // (stride or 32) + 1, tokens)
    half = {"weight": 1}
    both = told(32, None, {"kind": "mixture", "parts": [{"source": shards} | half, {"source": remote} | half]})
    assert [(part.samples, part.tokens) for part in both] == [((tokens - 33) // 32 + 1, tokens)] * 2
    unweighted = told(32, None, {"kind": "mixture", "parts": [{"source": shards}, {"source": remote}]})
    assert unweighted[0].share == 0.5
    config = load_run_config("spectra-tiny", [f"data.source.path={made['pairs'].folder}", "train.length=1000 tokens",
                                              "batch.global_batch_size=4", "batch.micro_batch_size=2"]).config
    steps, (pairs,) = mix_of(config)
    assert pairs.tokens == made["pairs"].splits["train"].tokens and pairs.samples == made["pairs"].splits["train"].docs
    assert steps == 1000 // (4 * config.data.tokens_per_sample) == 2
