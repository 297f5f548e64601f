"""The prep config of WikiText-2 on three small files of its form: lines, splits as published, headings that return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.config import PrepConfig
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare
from pretrain.config.load import load_run_config, load_yaml_model
from pretrain.config.presets import configs_dir
from pretrain.data.shards import ShardSource

FILES = {"train": " \n = One = \n \n the first text \n \n = = Plot = = \n \n what happens \n",
         "valid": " \n = Two = \n \n = = Plot = = \n \n the second text \n",
         "test": " \n = Three = \n \n = = Plot = = \n \n the first text \n"}


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-2-small"])
def test_every_line_is_a_document_of_the_split_it_was_published_in(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    raw = tmp_path / "data/raw/wikitext-2"
    raw.mkdir(parents=True)
    for file, text in FILES.items():
        (raw / f"{file}.txt").write_text(text)
    words = sorted({word for text in FILES.values() for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<|endoftext|>", "[UNK]"])},
                                           unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    config, _ = load_yaml_model(PrepConfig, configs_dir() / "prep" / f"{name}.yaml", ["workers=1"])
    folder = tmp_path / str(config.tokenizer.path)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    prepare(config)
    manifest = Manifest.read(tmp_path / config.out)
    for split, file in (("train", "train"), ("val", "valid"), ("test", "test")):
        lines = [line.split() for line in FILES[file].splitlines() if line.strip()]
        wanted = [word for line in lines for word in (*line, "<|endoftext|>")]
        source = ShardSource(manifest, split, seq_len=len(wanted) - 1)
        window = source.get(np.arange(1))
        ids = [*window["input_ids"][0].tolist(), tokenizer.token_to_id("<|endoftext|>")]
        assert [tokenizer.id_to_token(i) for i in ids] == wanted


def test_the_language_presets_read_what_it_writes() -> None:
    large, _ = load_yaml_model(PrepConfig, configs_dir() / "prep" / "wikitext-2.yaml")
    config = load_run_config("afrb-language").config
    assert config.data.source.path == large.out
    assert config.model.backbone.weights == large.tokenizer.path
    small, _ = load_yaml_model(PrepConfig, configs_dir() / "prep" / "wikitext-2-small.yaml")
    assert load_run_config("afrb-language-small").config.model.backbone.weights == small.tokenizer.path
