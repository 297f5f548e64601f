"""Pairs: the container against plain lists, sources and their rules, and that nothing stands in two splits."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_pipeline import hashes, killed

from data_prep.beir import write_beir
from data_prep.clean_config import TokenizerConfig
from data_prep.config import PrepConfig
from data_prep.manifest import Manifest, PairsRecord, write_manifest
from data_prep.pairs import PairReader, PairWriter, TokenPair, drawn_pairs, stored_pairs
from data_prep.pipeline import prepare
from data_prep.python_pairs import Mined, mine
from data_prep.source_config import PythonPairsSource
from data_prep.tokenizer import load_tokenizer, special_ids
from data_prep.verify import verify_dataset
from evaluation.embedding_data import read_beir
from pretrain.cli.main import main
from pretrain.errors import ConfigError, DataCorruption, UserError

TEXT = st.lists(st.integers(0, 999), min_size=1, max_size=9)
NEGATIVE = st.tuples(TEXT, st.integers(0, 2**64 - 1), st.none() | st.floats(-8, 8, width=32))
PAIRS = st.lists(st.tuples(TEXT, TEXT, st.lists(NEGATIVE, max_size=3), st.integers(0, 2**64 - 1)), max_size=14)


def write_pairs(folder, pairs, block_pairs, blocks_per_shard):
    folder.mkdir(exist_ok=True)
    with PairWriter(folder, "train", dtype=np.dtype("<u2"), block_pairs=block_pairs,
                    blocks_per_shard=blocks_per_shard) as writer:
        for i, (query, positive, negatives, query_id) in enumerate(pairs):
            writer.push(TokenPair(np.array(query), np.array(positive), [np.array(n[0]) for n in negatives], query_id,
                                  2**64 - 1 - i, [n[1] for n in negatives], [n[2] for n in negatives], {"i": i}), 5)
    return write_manifest(folder, Manifest(
        tokenizer_sha256=None, dtype="<u2", kind="pairs", block_tokens=0, eos_id=0, vocab_size=1000, provenance={},
        pairs=PairsRecord(block_pairs=block_pairs, prefix_ids=[], suffix_ids=[0], pad_id=1),
        splits={"train": writer.record}))


def plain(pair: TokenPair):
    return (pair.query.tolist(), pair.positive.tolist(),
            [(n.tolist(), i, s) for n, i, s in zip(pair.negatives, pair.negative_ids, pair.scores, strict=True)],
            pair.query_id)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(pairs=PAIRS, block_pairs=st.integers(1, 5), blocks_per_shard=st.integers(1, 3), offset=st.integers(0, 14))
def test_what_is_written_is_read(tmp_path_factory, pairs, block_pairs, blocks_per_shard, offset):
    folder = tmp_path_factory.mktemp("pairs")
    split = write_pairs(folder, pairs, block_pairs, blocks_per_shard).split("train")
    found = list(stored_pairs(split, offset))
    assert [plain(pair) for pair in found] == pairs[offset:]
    assert [pair.provenance["i"] for pair in found] == list(range(offset, len(pairs)))
    assert [pair.positive_id for pair in found] == [2**64 - 1 - i for i in range(offset, len(pairs))]
    sizes = [len(PairReader(split.tar_path(s)).block(b).ids) for s in range(split.n_shards)
             for b in range(PairReader(split.tar_path(s)).n_blocks)]
    assert len(sizes) == split.n_blocks
    assert all(size == block_pairs for size in sizes[:-1])
    assert not verify_dataset(folder).faults
    drawn = [pair.provenance["i"] for pair in drawn_pairs(split)]
    assert [plain(pair) for pair in drawn_pairs(split)] == [pairs[i] for i in drawn]
    assert drawn == np.random.default_rng(0).permutation(len(pairs)).tolist()


EXAMPLES = [([i, i + 1], [i] * (1 + i % 4), [([7 + j], j, 0.5) for j in range(i % 3)], i) for i in range(11)]


def test_stock_webdataset_reads_the_container_and_bytes_are_reproducible(tmp_path):
    split = write_pairs(tmp_path / "a", EXAMPLES, 3, 2).split("train")
    write_pairs(tmp_path / "b", EXAMPLES, 3, 2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    urls = [str(split.tar_path(i)) for i in range(split.n_shards)]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        texts = {side: [sample[f"{side}.tokens.npy"][a:b].tolist() for a, b in pairwise(sample[f"{side}.offsets.npy"])]
                 for side in "qpn"}
        negatives = list(zip(texts["n"], sample["n_ids.npy"].tolist(), sample["scores.npy"].tolist(), strict=True))
        for i, (a, b) in enumerate(pairwise(sample["n_offsets.npy"])):
            found.append((texts["q"][i], texts["p"][i], negatives[a:b], int(sample["ids.npy"][i, 0])))
    assert found == EXAMPLES
    assert split.n_shards == 2


def test_a_changed_byte_is_found_and_pairs_are_no_documents(tmp_path):
    manifest = write_pairs(tmp_path / "a", EXAMPLES, 3, 2)
    with pytest.raises(UserError, match=r"holds pairs, not documents.*kind: pairs"):
        manifest.require("documents")
    tar = tmp_path / "a" / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert [fault.split(": ")[0] for fault in verify_dataset(tmp_path / "a").faults] == [str(tar)]


MODULE = '''
import os
class A:
    def good(self, x):
        """Add one to the given number.

        More words."""
        # how
        y = x + 1
        return y * 1 + 0 * len("0123456789")
    def none(self):
        return 1
    def short(self):
        """Too short."""
        return [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    def long(self):
        """one two three four five six seven eight nine ten eleven"""
        return [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    def empty(self):
        """There is nothing below here."""
    async def stub(self):
        """There is nothing below here."""
        raise NotImplementedError("soon")
    def line(self): """This one is one line."""; return [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    def tiny(self):
        """This body is too small."""
        return 1
    def huge(self):
        """This body is too large."""
        return [1000000000000000000000, 1000000000000000000000, 1000000000000000000000, 10000000000]
    def echo(self):
        """Say that all is well."""
        print("Say that all is well.", file=os.devnull)
'''


def test_the_miner_applies_each_of_its_rules(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    rules = PythonPairsSource(max_summary_words=10, max_body_chars=90)
    found = list(mine(tmp_path / "m.py", rules, 10**6))
    assert found == [
        Mined("Add one to the given number.", 'y = x + 1\nreturn y * 1 + 0 * len("0123456789")', "good", 4),
        "no_docstring", "short_summary", "long_summary", "no_body", "stub", "one_line", "short_body", "long_body",
        "summary_in_body"]
    (tmp_path / "m.py").write_bytes(b"def f(:\n")
    assert [reason for reason, _ in mine(tmp_path / "m.py", rules, 10**6)] == ["no_python"]
    assert [reason for reason, _ in mine(tmp_path / "m.py", rules, 3)] == ["too_large"]
    (tmp_path / "m.py").write_bytes(b"x = '\xe9'\n")
    assert [reason for reason, _ in mine(tmp_path / "m.py", rules, 10**6)] == ["not_utf8"]


def config_of(out, sources, **changes) -> PrepConfig:
    values = {"out": str(out), "sources": sources, "splits": {"val": 0.3, "test": 0.2},
              "tokenizer": {"vocab_size": 300}, "block_pairs": 8, "blocks_per_shard": 2, "workers": 1,
              "max_bad_fraction": 1}
    return PrepConfig.model_validate(values | changes)


def contents(folder) -> dict[str, list[dict]]:
    """Split -> pairs with decoded texts."""
    manifest, tokenizer = Manifest.load(folder), load_tokenizer(Path(folder) / "tokenizer.json")

    def decoded(ids):
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return {name: [{"q": decoded(p.query), "p": decoded(p.positive), "n": list(map(decoded, p.negatives)),
                    "ids": (p.query_id, p.positive_id), "s": p.scores} | p.provenance
                   for p in stored_pairs(manifest.split(name))] for name in manifest.splits}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """12 packages; every one shares a summary with all and a body with the next."""
    root = tmp_path_factory.mktemp("packages")
    def function(name, summary, number):
        return (f'def {name}(x):\n    """{summary}"""\n    total = x * {number} + {number}\n'
                '    return [total] * 1000000\n\n')
    for i in range(12):
        (root / f"p{i}").mkdir()
        (root / f"p{i}" / "m.py").write_text(
            function("shared", "Give back the shared number.", 100 + i)
            + function("mine", f"Give back the number {'x' * (i + 1)}.", 200 + i)
            + function("vendored", f"Give a copy of number {'y' * (i + 1)}.", 300 + i // 2))
    return root


@pytest.fixture(scope="module")
def mined(packages, tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("mined") / "d", [{"kind": "python_pairs", "path": str(packages)}])
    prepare(config)
    return config


def test_no_query_package_or_body_is_in_two_splits(mined):
    found = contents(mined.out)
    assert all(len(pairs) > 2 for pairs in found.values())
    for of in (lambda pair: pair["q"], lambda pair: pair["path"].split("/")[0], lambda pair: pair["p"]):
        splits = [{of(pair) for pair in pairs} for pairs in found.values()]
        assert sum(map(len, splits)) == len(set.union(*splits))
    counts = {name: n["documents"] for name, n in
              Manifest.load(mined.out).provenance["counts"]["python_pairs"].items()}
    assert sum(counts.values()) == 36
    assert counts["query_in_other_split"] > 0 < counts["passage_in_other_split"]
    assert counts["kept"] == sum(map(len, found.values()))


@pytest.mark.parametrize("model", ["bpe", "identifiers"])
def test_a_split_becomes_a_beir_folder_of_whole_texts(mined, packages, tmp_path, model):
    """Decoded, or mined again where the tokenizer loses punctuation; a package that changed is told."""
    config = mined.model_copy(update={"out": str(tmp_path / "d"),
                                      "tokenizer": TokenizerConfig(vocab_size=300, model=model)})
    manifest = prepare(config)
    counts = write_beir(manifest.folder, "test", tmp_path / "beir", pool=12)
    judged = read_beir(tmp_path / "beir")
    want = contents(mined.out)["test"]
    assert {(judged.queries[q], judged.passages[p]) for q, found in enumerate(judged.relevant) for p in found} == {
        (pair["q"], pair["p"]) for pair in want}
    assert (len(judged.passages), counts.passages, counts.added) == (12, 12, 12 - len({pair["p"] for pair in want}))
    if model == "identifiers":
        file = packages / want[0]["path"]
        text = file.read_text()
        try:
            file.write_text(text.replace("total = ", "other = "))
            with pytest.raises(DataCorruption, match="the package changed"):
                write_beir(manifest.folder, "test", tmp_path / "beir")
        finally:
            file.write_text(text)


def test_a_killed_run_of_pairs_is_made_whole_with_any_number_of_workers(mined, tmp_path):
    config = mined.model_copy(update={"out": str(tmp_path / "d"), "workers": 2})
    killed(config, "pair:20", tmp_path / "killed.py")
    assert not (tmp_path / "d").exists()
    prepare(config)
    assert hashes(tmp_path / "d") == hashes(Path(mined.out))


def test_tables_give_their_rows_and_set_aside_the_rest(tmp_path):
    rows = [f"q{i // 2},p{i},n{i}" for i in range(40)]
    (tmp_path / "a.csv").write_bytes("\r\n".join(
        ["query,positive,neg", *rows, "q0,p0,other", ",p,n", "q,  ,n", "q,p,", '"two\nlines",p,n', ""]).encode()
        + b"q\xff,p,n\r\n")
    (tmp_path / "b.jsonl").write_text("\n".join([
        json.dumps({"query": "q0", "positive": "j", "neg": ["n1", "n2"]}), json.dumps({"query": "q1", "positive": "k"}),
        "{", json.dumps({"query": 3, "positive": "k"})]))
    sources = [{"kind": "pair_table", "name": name, "path": str(tmp_path / file), "negatives": ["neg"]}
               for name, file in (("a", "a.csv"), ("b", "b.jsonl"))]
    found = contents(prepare(config_of(tmp_path / "d", sources)).folder)
    pairs = [pair for split in found.values() for pair in split]
    assert {(p["q"], p["p"], *p["n"]) for p in pairs} == {
        *(tuple(row.split(",")) for row in rows), ("two\nlines", "p", "n"), ("q0", "j", "n1", "n2"), ("q1", "k")}
    splits = [{pair["q"] for pair in split} for split in found.values()]
    assert sum(map(len, splits)) == 21 == len(set.union(*splits))
    assert len({p["ids"][0] for p in pairs}) == 21
    counts = Manifest.load(tmp_path / "d").provenance["counts"]
    assert {k: n["documents"] for k, n in counts["a"].items()} == {
        "kept": 41, "duplicate": 1, "empty_query": 1, "empty_positive": 1, "empty_negative": 1, "not_utf8": 1}
    assert {k: n["documents"] for k, n in counts["b"].items()} == {"kept": 2, "bad_json": 1, "no_text": 1}
    with pytest.raises(ConfigError, match=r'sources\.0\.positive: .*no column "answer"; it has query, positive, neg'):
        prepare(config_of(tmp_path / "e", [sources[0] | {"positive": "answer"}]))


def test_a_beir_folder_gives_its_judgements_in_their_splits(tmp_path, monkeypatch, capsys):
    root = tmp_path / "beir"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("".join(
        json.dumps({"_id": f"d{i}", "title": f"T{i}" * (i % 2), "text": f"passage {i}"}) + "\n" for i in range(6)))
    (root / "queries.jsonl").write_text("".join(
        json.dumps({"_id": f"q{i}", "text": f"question {i}"}) + "\n" for i in range(4)))
    header = "query-id\tcorpus-id\tscore\n"
    (root / "qrels" / "train.tsv").write_text(header + "q0\td0\t1\nq0\td1\t2\nq0\td2\t0\nq1\td9\t1\nq1\td3\t1\nbad\n")
    (root / "qrels" / "test.tsv").write_text(header + "q2\td4\t1\nq0\td5\t1\n")
    sources = [{"kind": "beir", "name": name, "path": str(root), "qrels": [name], "split": name}
               for name in ("train", "test")]
    found = contents(prepare(config_of(tmp_path / "d", sources, splits={"test": 0})).folder)
    assert [(p["q"], p["p"], p["n"], p["s"]) for p in found["train"]] == [
        ("question 0", "passage 0", ["passage 2"], [0.0]), ("question 0", "T1 passage 1", ["passage 2"], [0.0]),
        ("question 1", "T3 passage 3", [], [])]
    assert [(p["q"], p["p"]) for p in found["test"]] == [("question 2", "passage 4")]
    counts = Manifest.load(tmp_path / "d").provenance["counts"]
    assert {k: n["documents"] for k, n in counts["train"].items()} == {"kept": 3, "bad_row": 1, "unknown_id": 1}
    assert {k: n["documents"] for k, n in counts["test"].items()} == {"kept": 1, "query_in_other_split": 1}
    for command, shown in (
            (["stats"], "train: 3 pairs"), (["peek", "--offset", "2"], "query, "), (["verify"], "sound")):
        monkeypatch.setattr(sys, "argv", ["pretrain", "data", *command[:1], str(tmp_path / "d"), *command[1:]])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        assert shown in (out := capsys.readouterr().out)
        assert command[0] != "peek" or ("question 1" in out and "passage 3" in out and "question 0" not in out)


def test_special_tokens_are_those_of_the_post_processor(mined):
    from tokenizers import processors
    tokenizer = load_tokenizer(Path(mined.out) / "tokenizer.json")
    assert special_ids(tokenizer, 0) == ([], [0])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|pad|> $A <|endoftext|>",
                                                             special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)])
    assert special_ids(tokenizer, 7) == ([1], [0])


def test_pairs_and_documents_share_no_dataset():
    with pytest.raises(ValidationError, match=r"sources\.1\.kind: python_pairs and stdlib"):
        config_of("x", [{"kind": "stdlib"}, {"kind": "python_pairs"}])
    with pytest.raises(ValidationError, match=r'sources\.0\.split: "dev" is no split'):
        config_of("x", [{"kind": "python_pairs", "split": "dev"}])
