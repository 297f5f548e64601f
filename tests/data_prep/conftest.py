"""A small corpus and the dataset made of it, once for all tests of preparation."""

import random
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare

WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "日本語", "return", "   ", "\n", "\t", "<|endoftext|>", "🙂"]


def text_of(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return f"{seed} " + " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """120 distinct documents in two folders, three copies, an empty file and one that is not UTF-8."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        path = root / ("a" if i % 3 else "b") / f"{i:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text_of(i, 5 + (i * 37) % 400), newline="")
    (root / "b" / "z0.txt").write_bytes((root / "a" / "001.txt").read_bytes())
    (root / "b" / "z1.txt").write_bytes(b"\xef\xbb\xbf" + (root / "a" / "002.txt").read_bytes().replace(b"\n", b"\r\n"))
    (root / "b" / "z2.txt").write_bytes(b"\n" + (root / "b" / "003.txt").read_bytes() + b" \n\n")
    (root / "b" / "z3.txt").write_bytes(b" \n\t ")
    (root / "b" / "z4.txt").write_bytes(b"caf\xe9")
    return root


@pytest.fixture(scope="session")
def make_config(corpus):
    def make(out, **changes) -> PrepConfig:
        values = {"out": str(out), "sources": [{"kind": "text", "name": "notes", "path": str(corpus)}],
                  "splits": {"val": 0.15, "test": 0.1}, "tokenizer": {"vocab_size": 400}, "block_tokens": 64,
                  "blocks_per_shard": 10, "workers": 1}
        return PrepConfig.model_validate(values | changes)
    return make


@pytest.fixture(scope="session")
def dataset(make_config, tmp_path_factory) -> Path:
    """The dataset of the corpus. Read only: copy it before you harm it."""
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(make_config(out))
    return out
