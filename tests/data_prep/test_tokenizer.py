"""The tokenizer: trained on train alone, blind to special tokens in text, and exact about bytes."""

import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.clean_config import TokenizerConfig
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare
from data_prep.split import Splitter, digest_of, keyed_hash
from data_prep.stats import stored_documents
from data_prep.tokenizer import (
    encode,
    eos_id,
    load_tokenizer,
    token_bytes,
    tokenizer_of,
    vocab_size,
)
from data_prep.tokenizer_training import sample_limit, train_tokenizer
from evaluation.bm25 import words


@pytest.fixture(scope="module")
def trained(dataset) -> Tokenizer:
    return load_tokenizer(dataset / "tokenizer.json")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_token_bytes_sum_to_the_bytes_of_the_text(trained, texts):
    texts.append("a <|endoftext|> b <|pad|>" + "".join(texts))
    tokens, lengths = encode(trained, texts, 0)
    sizes = token_bytes(trained)[tokens]
    ends = np.cumsum(lengths)
    assert [int(sizes[e - n:e].sum()) for n, e in zip(lengths, ends, strict=True)] == [len(t.encode()) for t in texts]
    assert [i for i, token in enumerate(tokens) if token == 0] == (ends - 1).tolist()
    assert trained.decode(tokens[:lengths[0] - 1].tolist()) == texts[0]


def test_token_bytes_beside_the_shards_are_exact_for_every_document(dataset):
    table = np.load(dataset / "token_bytes.npy")
    manifest = Manifest.load(dataset)
    assert (table.dtype, table.shape) == (np.int32, (manifest.vocab_size,))
    assert (table[manifest.eos_id], table[1]) == (0, 0)
    for name in manifest.splits:
        for document in stored_documents(manifest.split(name)):
            assert table[document.tokens].sum() == document.utf8_bytes


def test_training_sees_the_train_split_only(make_config, tmp_path):
    def plant(name, word, split):
        """A document full of `word` that belongs to `split`."""
        splitter = Splitter({"val": 0.15, "test": 0.1}, 0)
        texts = (f"{n} " + f" {word}" * 99 for n in range(1000))
        text = next(t for t in texts if splitter.split_of(digest_of(t.encode())) == split)
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"ordinary words {i}")
    for name in ("train", "val", "test"):
        plant(name, {"train": "xqzjtrn", "val": "kvwxval", "test": "yjqztst"}[name], name)
    source = {"kind": "text", "name": "t", "path": str(tmp_path / "texts")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source]))
    merges = json.loads((tmp_path / "d" / "tokenizer.json").read_text())["model"]["merges"]
    merged = {a + b for a, b in merges}
    assert any("xqzjtrn" in token for token in merged)
    assert not any(pair in token for token in merged for pair in ("kv", "vw", "wx", "yj", "jq", "ztst"))
    assert {m for m in manifest.splits if manifest.splits[m].docs} == {"train", "val", "test"}


def units_of(texts, seed, per_unit=100):
    """What `sample_limit` sees of a corpus of these train documents."""
    ranks = np.array([keyed_hash(digest_of(t.encode()), seed, "sample") for t in texts], np.uint64)
    sizes = np.array([len(t.encode()) for t in texts])
    zeros = np.zeros(len(texts), np.int64)
    return [(at, {"rank": ranks[at:at + per_unit], "size": sizes[at:at + per_unit], "split": zeros[at:at + per_unit]},
             zeros[at:at + per_unit]) for at in range(0, len(texts), per_unit)], ranks, sizes


@pytest.mark.parametrize("max_bytes", [1, 7, 6000, 14_000, 1 << 30])
def test_the_training_sample_is_the_most_that_fits_by_rank(max_bytes):
    texts = [f"{i:05d}" + "x" * (i % 7) for i in range(3000)]
    units, ranks, sizes = units_of(texts, 0)
    limit = sample_limit(units, 0, max_bytes)
    expected, total = [], 0  # slow reference
    for i in np.argsort(ranks).tolist():
        total += int(sizes[i])
        if total > max_bytes and expected:
            break
        expected.append(i)
    assert [i for i in range(3000) if int(ranks[i]) < limit] == sorted(expected)
    assert sample_limit(units[::-1], 0, max_bytes) == limit
    early = sum(i < 1500 for i in expected)
    assert early == pytest.approx(len(expected) / 2, abs=1 + 2 * len(expected)**0.5)
    other = units_of(texts, 1)[0]
    assert max_bytes > 10**6 or sample_limit(other, 0, max_bytes) != limit


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
def test_training_orders_special_tokens_first_and_is_reproducible_where_it_says_so(model):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ij", k=200)) for _ in range(50)]
    config = TokenizerConfig(vocab_size=320, model=model)
    first = train_tokenizer(lambda: texts, config)
    if model != "unigram":
        assert first.to_str() == train_tokenizer(lambda: texts, config).to_str()
        assert vocab_size(first) == 320
    assert (first.token_to_id("<|endoftext|>"), first.token_to_id("<|pad|>")) == (0, 1)
    assert eos_id(first, config) == 0
    assert [t.content for t in first.get_added_tokens_decoder().values()] == [
        "<|endoftext|>", "<|pad|>", *(["[UNK]"] if model == "wordpiece" else [])]


def test_identifiers_are_the_words_that_bm25_counts():
    """Of ASCII text: case, underscores and digits part words, and nothing else remains."""
    texts = ["getHTTPResponse_v2(self, fooBar)", "XMLParser a_b if not x:", "parse_xml12 {'key': [1.5]}"] * 3
    tokenizer = train_tokenizer(lambda: texts, TokenizerConfig(vocab_size=300, model="identifiers", min_frequency=1))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids).split() == words(text)
    assert tokenizer.encode("get_http_response V2 self foo bar").ids == tokenizer.encode(texts[0]).ids


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=st.text(max_size=40))
def test_bytes_are_the_alphabet_of_bpe_and_unigram(byte_tokenizers, text):
    for tokenizer in byte_tokenizers:
        ids, _ = encode(tokenizer, [text], None)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def byte_tokenizers():
    texts = ["some plain words in a row", "and others that follow them"] * 9
    return [tokenizer_of(train_tokenizer(lambda: texts, TokenizerConfig(vocab_size=300, model=model)).to_str().encode(),
                         model) for model in ("bpe", "unigram")]


def wordpiece() -> Tokenizer:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "words": 3, "notes": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]", "[PAD]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=2, pad_token="[PAD]", length=4)
    return tokenizer


def test_a_given_tokenizer_is_kept_as_it_is_but_neither_truncates_nor_pads(make_config, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words " * 50)
    (tmp_path / "texts" / "b.txt").write_text("notes")
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "[SEP]"}')
    manifest = prepare(make_config(
        tmp_path / "d", splits={}, sources=[{"kind": "text", "name": "t", "path": str(tmp_path / "texts")}],
        tokenizer={"path": str(tmp_path / "tokenizer.json"), "eos_token": "[SEP]"}))
    assert [d.tokens.tolist() for d in stored_documents(manifest.split("train"))] == [[3] * 50 + [1], [4, 1]]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert not (tmp_path / "d" / "token_bytes.npy").exists()  # pieces of words do not say how many bytes they were
    assert token_bytes(wordpiece()) is None


def test_a_tokenizer_of_another_dataset_gives_the_same_tokens(dataset, make_config, tmp_path):
    shutil.copy(dataset / "tokenizer.json", tmp_path / "tokenizer.json")
    prepare(make_config(tmp_path / "d", tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    for name in ("train-000000.tar", "val-000000.tar", "token_bytes.npy", "tokenizer.json"):
        assert (tmp_path / "d" / name).read_bytes() == (dataset / name).read_bytes()
