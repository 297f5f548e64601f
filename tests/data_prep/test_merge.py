"""Merging datasets: what one preparation of everything gives, copies once, and nothing that does not go together."""

import json
import shutil
import sys

import pytest
from test_pipeline import hashes

from data_prep.manifest import Manifest
from data_prep.merge import merge_datasets
from data_prep.pairs import stored_pairs
from data_prep.pipeline import prepare
from data_prep.stats import split_stats, stored_documents
from data_prep.verify import verify_dataset
from pretrain.cli.main import main
from pretrain.errors import UserError


@pytest.fixture
def parts(dataset, make_config, corpus, tmp_path):
    """A dataset of each of the corpus' folders and one of both, with one given tokenizer."""
    shutil.copy(dataset / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copy(dataset / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    sources = [{"kind": "text", "name": name, "path": str(corpus / name)} for name in ("a", "b")]
    configs = [make_config(tmp_path / name, sources=chosen, tokenizer={"path": str(tmp_path / "tokenizer.json")})
               for name, chosen in (("one", sources[:1]), ("two", sources[1:]), ("all", sources))]
    for config in configs:
        prepare(config)
    return tmp_path


def test_merging_parts_gives_the_shards_of_the_whole(parts):
    merged = merge_datasets(parts / "merged", [parts / "one", parts / "two"])
    whole = Manifest.load(parts / "all")
    expected = {name: digest for name, digest in hashes(parts / "all").items()
                if name not in ("manifest.json", "summary.html", "quarantine.jsonl")}
    found = hashes(parts / "merged")
    assert {name: found[name] for name in expected} == expected
    assert merged.splits == whole.splits
    assert not verify_dataset(parts / "merged").faults
    for split in whole.splits:
        assert split_stats(merged, split).by_source == split_stats(whole, split).by_source
    assert merged.provenance["counts"]["b"]["duplicate"]["documents"] == 2
    assert merge_datasets(parts / "again", [parts / "one", parts / "two"]).fingerprint == merged.fingerprint


def test_pairs_are_merged_too(make_config, tmp_path, dataset):
    shutil.copy(dataset / "tokenizer.json", tmp_path / "tokenizer.json")
    rows = [{"query": f"query {i}", "positive": f"passage {i}", "neg": [f"other {j}" for j in range(i % 3)]}
            for i in range(40)]
    for name, chosen in (("one", rows[:25]), ("two", rows[20:]), ("all", [*rows[:25], *rows[20:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        source = {"kind": "pair_table", "name": "p", "path": str(tmp_path / f"{name}.jsonl"), "negatives": ["neg"]}
        prepare(make_config(tmp_path / name, sources=[source], block_pairs=4, blocks_per_shard=2,
                            tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    merged = merge_datasets(tmp_path / "merged", [tmp_path / "one", tmp_path / "two"])
    assert merged.splits["train"].docs == Manifest.load(tmp_path / "all").splits["train"].docs
    assert sum(split.docs for split in merged.splits.values()) == 40
    assert merged.splits["train"].tokens == Manifest.load(tmp_path / "all").splits["train"].tokens


def queries(manifest):
    return {name: [pair.query.tolist() for pair in stored_pairs(manifest.split(name))] for name in manifest.splits}


def test_no_query_is_in_two_splits_of_merged_pairs(make_config, tmp_path, dataset):
    """Of datasets whose splits were drawn with other seeds, too; one dataset merged by itself keeps all of its own."""
    made = []
    for seed in (0, 7):
        (tmp_path / f"{seed}.jsonl").write_text("".join(
            json.dumps({"query": f"query {i}", "positive": f"passage {seed} {i}", "id": f"{seed}-{i}"}) + "\n"
            for i in range(60)))
        source = {"kind": "pair_table", "name": f"s{seed}", "path": str(tmp_path / f"{seed}.jsonl"), "query_id": "id"}
        made.append(prepare(make_config(tmp_path / f"d{seed}", sources=[source], seed=seed, splits={"val": 0.4},
                                        tokenizer={"path": str(dataset / "tokenizer.json")})))
    merged = merge_datasets(tmp_path / "merged", [manifest.folder for manifest in made])
    found = queries(merged)
    assert not {*map(tuple, found["train"])} & {*map(tuple, found["val"])}
    counts = merged.provenance["counts"]
    dropped = counts["s7"]["query_in_other_split"]["documents"]
    assert 10 < dropped == 60 - counts["s7"]["kept"]["documents"]
    assert set(counts["s0"]) == {"kept"} and sum(map(len, found.values())) == 120 - dropped
    assert not verify_dataset(merged.folder).faults


def test_no_document_is_in_two_splits_of_merged_ones(parts, make_config, corpus):
    made = [prepare(make_config(parts / f"d{seed}", seed=seed, tokenizer={"path": str(parts / "tokenizer.json")}))
            for seed in (0, 7)]
    merged = merge_datasets(parts / "merged", [manifest.folder for manifest in made])
    assert {name: split.docs for name, split in merged.splits.items()} == {
        name: split.docs for name, split in made[0].splits.items()}


def test_mined_packages_are_not_divided(make_config, tmp_path, dataset):
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "m.py").write_text("".join(
        f'def f{i}(x):\n    """Give back the number {"x" * (i + 1)}."""\n    total = x * {i} + {i}\n'
        "    return [total] * 1000000\n\n" for i in range(3)))
    sources, tokenizer = [{"kind": "python_pairs", "path": str(tmp_path / "p")}], str(dataset / "tokenizer.json")
    folders = [prepare(make_config(tmp_path / f"d{seed}", sources=sources, seed=seed, splits={"val": 1e-9},
                                   tokenizer={"path": tokenizer})).folder for seed in (0, 7)]
    with pytest.raises(UserError, match=r"their splits are drawn by other rules, .* packages"):
        merge_datasets(tmp_path / "merged", folders)


def test_what_does_not_go_together_is_refused(parts, dataset, make_config, tmp_path):
    other = prepare(make_config(tmp_path / "other", tokenizer={"vocab_size": 300})).folder
    with pytest.raises(UserError, match="cannot be merged: tokenizer_sha256 is"):
        merge_datasets(tmp_path / "x", [parts / "one", other])
    with pytest.raises(UserError, match="exists; give another folder"):
        merge_datasets(parts / "two", [parts / "one"])
    assert not (tmp_path / "x").exists()


def test_the_command_merges(parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "data", "merge", *(str(parts / n) for n in ("m", "one", "two"))])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert "train: " in capsys.readouterr().out
    assert len(list(stored_documents(Manifest.load(parts / "m").split("val")))) > 3
