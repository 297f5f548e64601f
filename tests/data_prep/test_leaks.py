"""Evaluation text in training data: dropped when sets are named, measured between any two sets of shards."""

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_prep.audit import Side, audit
from data_prep.manifest import Manifest
from data_prep.pairs import stored_pairs
from data_prep.pipeline import prepare
from data_prep.stats import stored_documents
from pretrain.cli.main import main
from pretrain.errors import ConfigError, UserError

WORDS = 60


def noise(draw: random.Random, count: int) -> list[str]:
    return [f"{draw.choice('bcdfgk')}{draw.randrange(3000)}" for _ in range(count)]


def write_lines(path, texts) -> dict:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "name": path.stem, "path": str(path)}


@pytest.fixture(scope="module")
def leaked(make_config, tmp_path_factory):
    """2,000 training documents and 1,000 evaluation documents, one of which (0.1%) stands in a training document."""
    root, draw = tmp_path_factory.mktemp("leaked"), random.Random(0)
    train = [" ".join(noise(draw, 150)) for _ in range(2000)]
    held_out = [" ".join(noise(draw, WORDS)) for _ in range(1000)]
    train[777] = " ".join([*noise(draw, 40), held_out[123].upper().replace(" ", ",  "), *noise(draw, 10)])
    sources = [write_lines(root / "train.jsonl", train),
               write_lines(root / "heldout.jsonl", held_out) | {"split": "val"}]
    config = make_config(root / "d", sources=sources, splits={"val": 0}, block_tokens=4096,
                         blocks_per_shard=20, tokenizer={"vocab_size": 600})
    prepare(config)
    return root, config


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err
    return call


def test_a_planted_leak_of_a_thousandth_is_found_and_leaves_with_5(leaked, run):
    out = leaked[1].out
    code, text, err = run("data", "audit", out, out, "--workers", "1")
    assert code == 5
    assert "contaminated: 1 (0.100%" in text and '"line": 124' in text and "100.0% covered, 60 words" in text
    assert "1 of 1,000 texts (0.100%)" in err and "0.050% is the limit" in err
    code, text, _ = run("data", "audit", out, f"{out}:val", "--limit", "0.001", "--json", "--workers", "1")
    stated = json.loads(text)
    assert code == 0
    assert (stated["contaminated"], stated["items"], stated["fraction"]) == (1, 1000, 0.001)
    assert stated["assessment"] == "low"
    assert stated["ci95"][0] < 0.001 < stated["ci95"][1]
    assert stated["train_fingerprint"] == Manifest.load(out).fingerprint
    assert stated["worst"][0]["excerpt"].split()[:3] == stated["worst"][0]["excerpt"].lower().split()[:3]


def test_workers_do_not_show_and_clean_data_passes(leaked, make_config, tmp_path, run):
    config = leaked[1]
    side, held_out = Side(config_path(config), "train"), Side(config_path(config), "val")
    assert Manifest.load(config.out).split("train").n_shards > 3
    assert audit(side, held_out, workers=2) == audit(side, held_out, workers=1)
    draw = random.Random(9)
    other = write_lines(tmp_path / "other.jsonl", [" ".join(noise(draw, WORDS)) for _ in range(50)])
    prepare(make_config(tmp_path / "o", sources=[other], splits={}, tokenizer={"vocab_size": 300}))
    code, text, _ = run("data", "audit", config.out, f"{tmp_path / 'o'}:train", "--workers", "1")  # other tokenizers
    assert code == 0 and "contaminated: 0 (0.000%" in text
    with pytest.raises(UserError, match="other tokenizers"):
        audit(side, Side(tmp_path / "o", "train"), level="token")


def config_path(config) -> Path:
    return Path(config.out)


def test_tokens_are_compared_where_they_mean_the_same(leaked, make_config, tmp_path):
    """At level token a copy in other case is missed and a plain one found, whole or from anywhere inside."""
    root, config = leaked
    assert audit(Side(config_path(config), "train"), Side(config_path(config), "val"), level="token").contaminated == 0
    texts = [json.loads(line)["text"] for line in (root / "heldout.jsonl").read_text().splitlines()]
    train = ["x " + " ".join(texts[5].split()[10:45]) + " y", texts[6], "nothing of it " * 20]
    shutil.copy(config_path(config) / "tokenizer.json", tmp_path / "tokenizer.json")
    prepare(make_config(tmp_path / "t", sources=[write_lines(tmp_path / "t.jsonl", train)], splits={},
                        tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    found = audit(Side(tmp_path / "t", "train"), Side(config_path(config), "val"), level="token")
    assert found.contaminated == 2
    assert sorted(f.provenance["line"] for f in found.worst[:2]) == [6, 7]


def test_boilerplate_is_told_apart(make_config, tmp_path):
    draw = random.Random(4)
    licence = " ".join(noise(draw, 40))
    train = [f"{licence} {' '.join(noise(draw, 30))}" for _ in range(12)]
    held_out = [f"{licence} {' '.join(noise(draw, 10))}", " ".join(noise(draw, 50))]
    sources = [write_lines(tmp_path / "t.jsonl", train), write_lines(tmp_path / "v.jsonl", held_out) | {"split": "val"}]
    prepare(make_config(tmp_path / "d", sources=sources, splits={"val": 0}, block_tokens=4096))
    sides = Side(tmp_path / "d", "train"), Side(tmp_path / "d", "val")
    found = audit(*sides)
    assert (found.contaminated, found.suspicious, found.boilerplate_ngrams, found.boilerplate_items) == (0, 0, 28, 1)
    assert (found.whole, audit(*sides, boilerplate=12).contaminated) == (0, 1)


def test_a_text_that_stands_whole_in_many_documents_fails_the_audit(make_config, tmp_path, run):
    """All its n-grams are boilerplate. A header that another text shares with the same documents still is that."""
    draw = random.Random(6)
    copied, header = " ".join(noise(draw, 40)), " ".join(noise(draw, 30))
    train = [f"{copied} {' '.join(noise(draw, 9))} {header} {' '.join(noise(draw, 9))}" for _ in range(11)]
    held_out = [copied, f"{header} {' '.join(noise(draw, 8))}", " ".join(noise(draw, 50))]
    sources = [write_lines(tmp_path / "t.jsonl", train), write_lines(tmp_path / "v.jsonl", held_out) | {"split": "val"}]
    out = prepare(make_config(tmp_path / "d", sources=sources, splits={"val": 0}, block_tokens=4096)).folder
    for level in ("word", "token"):
        code, text, _ = run("data", "audit", out, out, "--json", "--workers", "1", "--level", level)
        stated = json.loads(text)
        assert code == 5
        assert (stated["contaminated"], stated["whole"]) == (1, 1)
        assert level == "token" or (stated["suspicious"], stated["boilerplate_items"]) == (0, 1)
        assert stated["worst"][0]["provenance"]["line"] == 1 and stated["worst"][0]["overlap"]["coverage"] == 1
    assert "contaminated all the same: 1 texts" in run("data", "audit", out, out, "--workers", "1")[1]


def test_texts_of_pairs_are_audited(make_config, tmp_path, run):
    """Each side is a text of its own; a short one that many pairs hold is no boilerplate."""
    train = [{"query": "what is it", "positive": f"answer {i}"} for i in range(12)]
    held_out = [{"query": "never asked", "positive": "What is it?"}, {"query": "a question", "positive": "a passage"}]
    sources = []
    for name, rows, split in (("v", held_out, "val"), ("t", train, "train")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"kind": "pair_table", "name": name, "path": str(tmp_path / f"{name}.jsonl"), "split": split})
    out = prepare(make_config(tmp_path / "d", sources=sources, splits={"val": 0})).folder
    code, text, _ = run("data", "audit", out, out, "--json", "--workers", "1")
    stated = json.loads(text)
    assert code == 5
    assert (stated["items"], stated["contaminated"], stated["boilerplate_ngrams"]) == (4, 1, 0)
    assert stated["worst"][0]["provenance"]["side"] == "positive"


def test_named_evaluation_sets_leave_the_training_data(make_config, tmp_path):
    draw = random.Random(5)
    items = [" ".join(noise(draw, WORDS)) for _ in range(30)]
    licence = " ".join(noise(draw, 20))
    questions = ["what is it", "never asked"]
    half = items[3].split()
    train = {
        "whole": f"{' '.join(noise(draw, 20))} {items[0]}", "half": " ".join(half[:31]),
        "run": " ".join([*noise(draw, 5), *items[4].split()[:50]]), "touch": " ".join([*noise(draw, 9), *half[:20]]),
        "short": "What is IT?", "longer": "so what is it then", "clean": " ".join(noise(draw, 99)),
        "val": f"{items[7]} in a split that is not trained on",
        **{f"licence{i}": f"{licence} {' '.join(noise(draw, 30))}" for i in range(11)}}
    source = write_lines(tmp_path / "t.jsonl", train.values())
    held = write_lines(tmp_path / "held.jsonl", [train["val"]]) | {"split": "val"}
    items[9] = f"{items[9]} {licence}"
    against = [write_lines(tmp_path / "bench.jsonl", items), write_lines(tmp_path / "quiz.jsonl", questions)]
    config = make_config(tmp_path / "d", sources=[held, source], splits={"val": 0}, block_tokens=4096,
                         decontaminate={"against": against})
    manifest = prepare(config)
    names = list(train)
    kept = {names[d.provenance["line"] - 1] for d in stored_documents(manifest.split("train"))}
    assert set(names) - kept == {"whole", "half", "run", "short", "val"}  # val: the exact copy
    assert manifest.splits["val"].docs == 1
    made = manifest.provenance
    assert made["counts"]["t"]["contaminated"]["documents"] == 4
    assert made["decontamination"]["sets"] == {
        "bench": {"items": 30, "contaminated": 3, "suspicious": 0, "unreadable": 0, "documents_dropped": 3},
        "quiz": {"items": 2, "contaminated": 1, "suspicious": 0, "unreadable": 0, "documents_dropped": 1}}
    assert made["decontamination"]["boilerplate"]["ngrams"] == 8
    assert made["decontamination"]["boilerplate"]["examples"][0]["documents"] == 11
    assert " ".join(licence.split()[:13]) in [e["text"] for e in made["decontamination"]["boilerplate"]["examples"]]
    report = [json.loads(line) for line in (tmp_path / "d" / "contamination.jsonl").read_text().splitlines()]
    assert [(names[json.loads(r["document"])["line"] - 1], r["evaluation"]["line"], r["coverage"], r["run"])
            for r in report] == [("whole", 1, 1.0, 60), ("half", 4, round(31 / 60, 4), 31),
                                 ("run", 5, round(5 / 6, 4), 50), ("short", 1, 1.0, 3)]
    assert report[0]["excerpt"] == " ".join(items[0].split()[:30])


def test_any_text_of_a_pair_counts_and_headerless_sets_can_be_named(make_config, tmp_path):
    (tmp_path / "sts.csv").write_text("A man is playing a flute.,A man plays a flute.,5.0\nOne cat.,Two dogs.,0.4\n")
    rows = [("a question here", "an answer", "A man plays a flute"), ("one CAT", "fine", "x"),
            ("all fine", "yes", "no"), ("two", "two dogs and more", "no")]
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps(dict(zip(("query", "positive", "neg"), row, strict=True))) + "\n" for row in rows))
    sources = [{"kind": "pair_table", "name": "p", "path": str(tmp_path / "p.jsonl"), "negatives": ["neg"]}]
    sts = {"kind": "pair_table", "name": "sts", "path": str(tmp_path / "sts.csv"), "query": "a", "positive": "b",
           "columns": ["a", "b", "score"]}
    manifest = prepare(make_config(tmp_path / "d", sources=sources, splits={}, decontaminate={"against": [sts]}))
    assert manifest.provenance["counts"]["p"] == {"kept": {"documents": 2, "bytes": 35},
                                                  "contaminated": {"documents": 2, "bytes": 55}}
    assert manifest.provenance["decontamination"]["sets"]["sts"]["items"] == 4


def test_no_pair_of_a_drawn_split_holds_an_evaluation_sentence(make_config, tmp_path):
    """However many pairs share it, whole as well as inside of a longer text; a long header is boilerplate."""
    draw = random.Random(8)
    short, long, header = "A man is playing a guitar.", " ".join(noise(draw, 20)), " ".join(noise(draw, 14))
    (tmp_path / "sts.csv").write_text(f"{short},{long},5\n{header} {' '.join(noise(draw, 30))},nothing,1\n")
    texts = {"short": "a man is playing a GUITAR", "long": f"so it is: {long}, or not", "header": f"{header} and more",
             "clean": "all fine here"}
    rows = [{"query": f"{name} {i}", "positive": text if i % 2 else "x", "neg": "y" if i % 2 else text}
            for name, text in texts.items() for i in range(24)]
    sources = []
    held = [row | {"query": row["query"] + "h"} for row in rows]
    for name, chosen, split in (("drawn", rows, None), ("held", held, "test")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        sources.append({"kind": "pair_table", "name": name, "path": str(tmp_path / f"{name}.jsonl"),
                        "negatives": ["neg"], "split": split})
    sts = {"kind": "pair_table", "name": "sts", "path": str(tmp_path / "sts.csv"), "query": "a", "positive": "b",
           "columns": ["a", "b", "score"]}
    manifest = prepare(make_config(tmp_path / "d", sources=sources, splits={"val": 0.5, "test": 0},
                                   decontaminate={"against": [sts]}))
    kept = {split: Counter(("short", "long", "header", "clean")[(pair.provenance["line"] - 1) // 24]
                           for pair in stored_pairs(manifest.split(split))) for split in manifest.splits}
    assert kept["train"] + kept["val"] == {"header": 24, "clean": 24} and min(kept["val"].values()) > 5
    assert kept["test"] == dict.fromkeys(texts, 24)  # what a source holds out may be the evaluation set itself
    made = manifest.provenance["decontamination"]
    assert made["sets"]["sts"] == {"items": 4, "contaminated": 2, "suspicious": 0, "unreadable": 0,
                                   "documents_dropped": 48}
    report = [json.loads(line) for line in (tmp_path / "d" / "contamination.jsonl").read_text().splitlines()]
    assert {(one["coverage"], one["run"]) for one in report} == {(1.0, 6), (1.0, 20)} and len(report) == 48


def test_an_evaluation_set_that_is_not_there_is_refused(make_config, tmp_path):
    missing = {"kind": "jsonl", "name": "gone", "path": str(tmp_path / "gone.jsonl")}
    with pytest.raises(ConfigError, match=r"decontaminate\.against\.0\.path: .*gone\.jsonl does not exist"):
        prepare(make_config(tmp_path / "d", decontaminate={"against": [missing]}))
    assert list(tmp_path.iterdir()) == []
