"""The prep configs of the sizes of Spectra, on a few rows and a small WordPiece vocabulary of their form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from pretrain.cli.plan_text import training_samples
from pretrain.config.load import load_run_config, load_yaml_model
from pretrain.config.presets import configs_dir
from pretrain.data.open import open_source, open_validation

WORDS = ["what", "is", "the", "answer", "wrong", "place", "number", "text", "long", "about"]


def config_of(name: str, *sets: str) -> PrepConfig:
    return load_yaml_model(PrepConfig, configs_dir() / "prep" / f"{name}.yaml", ["workers=1", *sets])[0]


def test_triplets_and_a_corpus_in_one_vocabulary_are_what_the_presets_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    triplets = config_of("msmarco-triplets")
    wanted = triplets.sources[0]
    assert (wanted.queries, wanted.validation_queries, wanted.seed) == (100_000, 2_000, 42)  # type: ignore[union-attr]

    Path("bert").mkdir()
    Path("bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##1"]))
    Path("bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer",
                                                              "do_lower_case": True}))
    rows = [{"query": f"What is number {i}", "positive": f"the answer {i} place", "negative": f"wrong text {i}"}
            for i in range(40) for _ in range(2)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(config_of("msmarco-triplets", "sources.0.dataset={path: json, data_files: [rows.jsonl]}",
                      "tokenizer.path=bert", "sources.0.queries=30", "sources.0.validation_queries=10"))
    run = load_run_config("spectra-m456").config
    source, validation = open_source(run.data.source, run.data), open_validation(run)
    assert validation is not None
    assert training_samples(run)[0] == len(source) == 20
    train, val = source.get(np.arange(20)), validation.get(np.arange(10))
    assert not set(train["query_ids"].tolist()) & set(val["query_ids"].tolist())
    first = val["query_input_ids"][0].tolist()
    assert (first[0], first[1], 3 in first, first[-1]) == (2, 5, True, 0)  # [CLS] what ... [SEP] [PAD] ...

    Path("pages.jsonl").write_text("".join(json.dumps({"text": f"the long text about number {i} " * 60}) + "\n"
                                           for i in range(40)))
    prepare(config_of("corpus-bert", "sources.0.dataset={path: json, data_files: [pages.jsonl]}",
                      "block_tokens=256"))
    trunk = load_run_config("spectra-m456-trunk").config
    assert training_samples(trunk)[0]
    one, other = (Path(f"data/{name}/tokenizer.json").read_bytes() for name in ("corpus-bert", "msmarco-triplets"))
    assert one == other
