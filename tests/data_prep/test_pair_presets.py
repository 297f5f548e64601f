"""Row rules of the well-known sets of pairs, on small files of the same shape."""

import gzip
import hashlib
import json

import pytest

from data_prep.pair import Pair, Rejected
from data_prep.pair_presets import cut_at_word
from data_prep.pair_sources import read_pairs
from data_prep.pipeline import prepare
from data_prep.reading import SetAside
from data_prep.source_config import PairPresetSource


def read(tmp_path, preset, rows, name="rows.jsonl", **options):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return list(read_pairs(PairPresetSource(name="s", preset=preset, path=str(tmp_path), **options), 0, 1 << 20))


def shown(found):
    return [(p.query.text, p.positive.text, *(n.text for n in p.negatives)) if isinstance(p, Pair) else p.reason
            for p in found]


def test_allnli_keeps_the_contradiction_as_a_negative(tmp_path):
    rows = [["a man is walking", "a person moves", "nobody moves at all"], ["too short", "a person moves", "x"],
            ["the same text", "the same text", "nobody moves"], ["a dog is running", "an animal moves", ""],
            {"anchor": "a cat is asleep", "positive": "an animal rests", "negative": "no animal rests"}, ["a", "b"]]
    found = read(tmp_path, "allnli", rows, "AllNLI.jsonl.gz")
    assert shown(found) == [
        ("a man is walking", "a person moves", "nobody moves at all"), "short_side", "equal_sides",
        ("a dog is running", "an animal moves"), ("a cat is asleep", "an animal rests", "no animal rests"), "bad_row"]
    assert isinstance(found[-1], SetAside) and isinstance(found[1], Rejected)
    assert found[-1].provenance == {"source": "s", "path": "AllNLI.jsonl.gz", "line": 6,
                                    "offset": sum(len(json.dumps(row)) + 1 for row in rows[:5])}


def test_qqp_takes_duplicates_of_its_first_rows_only(tmp_path):
    rows = [{"question1": f"what is number {i}?", "question2": f"which one is number {i}?", "label": i % 2, "idx": i}
            for i in range(8)]
    assert shown(read(tmp_path, "qqp", rows, max_rows=5)) == [
        "no_duplicate", ("what is number 1?", "which one is number 1?"), "no_duplicate",
        ("what is number 3?", "which one is number 3?"), "no_duplicate"]
    assert all(isinstance(p, Pair) for p in read(tmp_path, "qqp", rows, legacy_labels=True))


def test_qqp_reads_the_tables_of_glue(tmp_path):
    (tmp_path / "train.tsv").write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
                                        "0\t1\t2\tHow do I \"quit\" vim?\tHow to leave the editor?\t1\n"
                                        "1\t3\t4\tWhat is this here?\tWho are you then?\t0\n3\tbroken\n")
    found = list(read_pairs(PairPresetSource(name="s", preset="qqp", path=str(tmp_path), glob="*.tsv"), 0, 1 << 20))
    assert shown(found) == [('How do I "quit" vim?', "How to leave the editor?"), "no_duplicate", "bad_row"]


def test_msmarco_takes_the_first_selected_passage_cut_at_a_word(tmp_path):
    def row(selected, texts, query="what is the answer"):
        return {"query": query, "query_id": 1, "passages": {"is_selected": selected, "passage_text": texts}}
    long = "word " * 100
    rows = [row([0, 1, 1], ["not this one at all, no", long, "nor this one at all, no"]), row([0, 0], ["a", "b"]),
            row([1], ["only twenty letters"]), row([1], ["a passage that is long enough"]), {"query": "x"}]
    found = shown(read(tmp_path, "msmarco", rows))
    assert found[0] == ("what is the answer", ("word " * 40).strip())
    assert found[1:] == ["no_selected_passage", "short_passage",
                         ("what is the answer", "a passage that is long enough"), "bad_row"]


@pytest.mark.parametrize("text, cut", [("abc def ghi", "abc def"), ("abcdefghijk", "abcdefgh"),
                                       ("abc defg", "abc defg"), ("abcdefgh ij", "abcdefgh")])
def test_cutting_ends_with_a_whole_word(text, cut):
    assert cut_at_word(text, 8) == cut


GOOD = {"allnli": {"anchor": "a man is walking", "positive": "a person moves", "negative": "nobody moves"},
        "qqp": {"question1": "how old is he?", "question2": "what is his age?", "label": 1},
        "msmarco": {"query": "what is the answer", "passages": {
            "is_selected": [0, 1], "passage_text": ["no", "a passage that is long enough"]}},
        "wikianswers": {"anchor": "how old is he?", "positive": "what is his age?"},
        "snli": {"premise": "a man is walking", "hypothesis": "a person moves", "label": 0},
        "msmarco_triplets": {"query": "q", "positive": "p", "negative": "n"}}


@pytest.mark.parametrize("preset", GOOD)
def test_a_field_of_another_kind_is_a_bad_row(tmp_path, preset):
    """In every field of every preset: counted and set aside, while the good row before it is kept."""
    good = GOOD[preset]
    rows = [good | {name: value} for name in good for value in (None, 7, ["x"], {"x": 1})
            if not (name == "label" and value == 7)]
    if preset == "msmarco":
        rows += [good | {"passages": good["passages"] | {name: value}} for name in good["passages"]
                 for value in (None, 7, "01", ["x"], {"x": 1}, [None, None], [0, [1]])]
    assert isinstance(read(tmp_path, preset, [good])[0], Pair)
    found = read(tmp_path, preset, rows)
    assert [(one.reason, isinstance(one, SetAside)) for one in found] == [("bad_row", True)] * len(rows)


def test_labels_are_numbers_however_they_are_written(tmp_path):
    row = GOOD["qqp"]
    found = shown(read(tmp_path, "qqp", [row | {"label": label} for label in (1, True, 1.0, "1", "1.0", "True")]))
    assert found == [("how old is he?", "what is his age?")] * 6
    found = shown(read(tmp_path, "qqp", [row | {"label": label} for label in (0, False, 0.0, "0", "0.0", -1, 10**400)]))
    assert found == ["no_duplicate"] * 7
    assert shown(read(tmp_path, "qqp", [row | {"label": float("nan")}])) == ["bad_row"]
    found = shown(read(tmp_path, "snli", [GOOD["snli"] | {"label": label} for label in ("0.0", "0", 0.0, "-")]))
    assert found == [("a man is walking", "a person moves")] * 3 + ["no_entailment"]


def test_wikianswers_and_snli_rules(tmp_path):
    questions = [["how old is he?", "what is his age?"], {"anchor": "where is paris?", "positive": "is it in france?"}]
    assert shown(read(tmp_path, "wikianswers", questions)) == [
        ("how old is he?", "what is his age?"), ("where is paris?", "is it in france?")]
    rows = [{"premise": f"a man walks {i}", "hypothesis": f"someone walks {i}", "label": label}
            for i, label in enumerate([0, 1, 2, -1, 0])]
    rows.append({"sentence1": "a man is here", "sentence2": "someone is here", "gold_label": "entailment"})
    rows.append({"sentence1": "a man is here", "sentence2": "someone is here", "gold_label": "neutral"})
    found = shown(read(tmp_path, "snli", rows))
    assert [f if isinstance(f, str) else f[0] for f in found] == [
        "a man walks 0", *["no_entailment"] * 3, "a man walks 4", "a man is here", "no_entailment"]
    legacy = shown(read(tmp_path, "snli", rows, legacy_labels=True))
    assert legacy.count("no_entailment") == 2
    assert len([p for p in read(tmp_path, "snli", rows, max_documents=2) if isinstance(p, Pair)]) == 2


def test_the_order_of_two_texts_makes_no_other_pair(make_config, tmp_path):
    rows = [["how old is he?", "What is his age?"], ["what is  his age?", "how old is he?"],
            ["how old is he?", "his age?!!!!"]]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "pair_preset", "name": "w", "preset": "wikianswers", "path": str(tmp_path / "w.jsonl")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={}))
    assert {k: n["documents"] for k, n in manifest.provenance["counts"]["w"].items()} == {"kept": 2, "duplicate": 1}


def triplets(queries=40, rows=200):
    return [{"query": f"query number {i % queries}", "positive": f"answer {i}", "negative": f"no answer {i}"}
            for i in range(rows)]


def rank(query: str) -> int:
    digest = hashlib.blake2b(query.encode(), digest_size=16, key=(42).to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def test_triplets_are_one_for_each_of_the_queries_with_the_smallest_hash(tmp_path):
    rows = [*triplets(), {"query": "query number 1", "positive": " ", "negative": "n"}, {"query": "x", "positive": "y"}]
    found = read(tmp_path, "msmarco_triplets", rows, queries=10, validation_queries=3)
    pairs = [p for p in found if isinstance(p, Pair)]
    expected = sorted({row["query"] for row in triplets()}, key=rank)[:10]
    assert [p.query.text for p in pairs] == expected
    assert [p.positive.text for p in pairs] == [f"answer {q.split()[-1]}" for q in expected]
    assert [p.split for p in pairs] == ["val"] * 3 + ["train"] * 7
    reasons = [p.reason for p in found if not isinstance(p, Pair)]
    assert sorted(set(reasons)) == ["bad_row", "empty_field", "not_drawn"]
    assert len(found) == len(rows)
    again = [p.query.text for p in read(tmp_path, "msmarco_triplets", rows[::-1], queries=10) if isinstance(p, Pair)]
    assert again == expected


def test_triplets_make_a_dataset_without_a_query_in_two_splits(make_config, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triplets()))
    source = {"kind": "pair_preset", "name": "t", "preset": "msmarco_triplets", "path": str(tmp_path / "t.jsonl"),
              "queries": 20, "validation_queries": 4}
    with pytest.raises(ValueError, match=r"sources\.0\.validation_queries: .*split val"):
        make_config(tmp_path / "d", sources=[source], splits={})
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={"val": 0}))
    assert {name: split.docs for name, split in manifest.splits.items()} == {"train": 16, "val": 4}


def test_a_dataset_of_the_library_gives_the_same_pairs(make_config, tmp_path):
    import datasets
    rows = triplets(5, 9)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"kind": "pair_table", "name": "t", "negatives": ["negative"]}
    files = make_config(tmp_path / "a", sources=[common | {"path": str(tmp_path / "t.jsonl")}], splits={})
    library = make_config(tmp_path / "b", sources=[common | {"dataset": {"path": str(tmp_path / "saved")}}], splits={})
    first, second = prepare(files), prepare(library)
    assert first.splits["train"].tokens == second.splits["train"].tokens
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    for both in ({}, {"path": "x", "dataset": {"path": "y"}}):
        with pytest.raises(ValueError, match="either path or dataset"):
            make_config(tmp_path / "c", sources=[common | both])
