"""Names of the hub: what is asked of it, and what becomes of the answer. The hub itself is a folder here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import Tokenizer, models

from data_prep.clean_config import TokenizerConfig
from data_prep.rows import open_hub
from data_prep.source_config import HubDataset
from data_prep.tokenizer import given_tokenizer, tokenizer_of
from pretrain.errors import ConfigError

NAME = "somebody/small"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the hub gives the files of NAME at revision v1 from."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def download(name: str, file: str, *, revision: str | None) -> str:
        assert (name, revision) == (NAME, "v1")
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        return str(folder / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    return folder


def asked() -> TokenizerConfig:
    return TokenizerConfig(path=NAME, revision="v1")


def test_a_tokenizer_of_the_hub_comes_with_its_config_where_it_has_one(hub: Path) -> None:
    small = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (hub / "tokenizer.json").write_text(small.to_str())
    assert given_tokenizer(asked()).beside is None
    (hub / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    found = given_tokenizer(asked())
    assert found.content == (hub / "tokenizer.json").read_bytes() and found.beside == b'{"eos_token": "a"}'


def test_a_tokenizer_of_another_format_is_converted(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "##s"]))
    import transformers
    real = transformers.BertTokenizer

    def from_pretrained(name: str, revision: str | None) -> Any:
        assert (name, revision) == (NAME, "v1")
        return real.from_pretrained(str(hub))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    converted = tokenizer_of(given_tokenizer(asked()).content, NAME)
    assert converted.encode("words word", add_special_tokens=False).tokens == ["word", "##s", "word"]


def test_what_the_hub_does_not_have_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise ConnectionError("no route to the hub\nand a page of advice")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ConfigError, match=r"^tokenizer.path: somebody/small: not here and not found on the hub \(no "
                                          r"route to the hub\)$"):
        given_tokenizer(asked())
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ConfigError, match=r"^sources.0.dataset: somebody/small: cannot be opened \(ConnectionError: no "
                                          r"route to the hub\)$"):
        open_hub(HubDataset(path=NAME), "sources.0")


def test_a_dataset_is_asked_for_by_name_with_all_that_was_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **named: told.append((words, named)) or "it")
    stated = HubDataset(path=NAME, subset="en", split="validation", revision="v1", streaming=True)
    assert open_hub(stated, "sources.0") == "it"
    assert told == [((NAME, "en"), {"split": "validation", "revision": "v1", "data_files": None, "streaming": True})]
