"""Damaged input: counted, kept in the quarantine with file and line, never lost silently, fatal only when asked."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.manifest import Manifest
from data_prep.pipeline import prepare
from data_prep.stats import stored_documents
from pretrain.cli.main import main
from pretrain.errors import DataCorruption

GOOD = [json.dumps({"text": f"a good line, number {i}, of some words"}).encode() for i in range(120)]
BAD = {3: (b'{"text": "caf\xe9"}', "not_utf8"), 17: (b'{"text": "nul\\u0000byte"}', "nul_bytes"),
       30: (b'{"text": "broken', "bad_json"), 31: (b'{"text": ""}', "empty"), 44: (b'{"body": "moved"}', "no_text"),
       50: (b'{"text": "' + b"x" * 3000 + b'"}', "too_large"), 51: (b"\x00\x01\x02", "bad_json"),
       70: (b'{"text": "' + b"y" * (9 << 20) + b'"}', "too_large"), 99: (b'{"text": "\\ud800"}', "not_utf8")}


def lines_with_faults() -> bytes:
    return b"\n".join(BAD.get(i, (line,))[0] for i, line in enumerate(GOOD)) + b"\n"


def outcome(manifest: Manifest):
    """(reason -> documents, (reason, path, line or row) of the quarantine)."""
    counts = {reason: entry["documents"] for counts in manifest.provenance["counts"].values()
              for reason, entry in counts.items()}
    lines = [json.loads(line) for line in (manifest.folder / "quarantine.jsonl").read_text().splitlines()]
    return counts, [(line["reason"], line.get("path"), line.get("line", line.get("row"))) for line in lines]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_fault_of_a_line_is_named_and_the_others_kept(make_config, tmp_path, workers):
    (tmp_path / "in.jsonl").write_bytes(lines_with_faults())
    source = {"kind": "jsonl", "name": "j", "path": str(tmp_path / "in.jsonl")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], max_bad_fraction=0.1, max_document_bytes=1000,
                                   workers=workers, splits={}))
    counts, quarantine = outcome(manifest)
    assert quarantine == [(reason, "in.jsonl", i + 1) for i, (_, reason) in BAD.items()]
    assert counts["kept"] == len(GOOD) - len(BAD)
    assert sum(counts.values()) == len(GOOD)
    kept = [d.provenance["line"] for d in stored_documents(manifest.split("train"))]
    assert kept == [i + 1 for i in range(len(GOOD)) if i not in BAD]


def test_whole_files_that_fail_are_named(make_config, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    table = pyarrow.table({"text": [f"row {i} of the first file" for i in range(50)]})
    pyarrow.parquet.write_table(table, root / "a.parquet")
    pyarrow.parquet.write_table(table.rename_columns(["body"]), root / "b.parquet")  # another schema from here on
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, None, 3]}), root / "c.parquet")
    whole = (root / "a.parquet").read_bytes()
    (root / "d.parquet").write_bytes(whole[:len(whole) // 2])
    (root / "e.parquet").write_bytes(b"")
    source = {"kind": "parquet", "name": "p", "path": str(root)}
    counts, quarantine = outcome(prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=1)))
    assert counts == {"kept": 50, "no_column": 50, "no_text": 3, "unreadable": 2}
    assert quarantine == [("no_column", "b.parquet", 0), *(("no_text", "c.parquet", i) for i in range(3)),
                          ("unreadable", "d.parquet", 0), ("unreadable", "e.parquet", 0)]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_truncated_archive_gives_what_is_whole_and_says_where_it_ends(make_config, tmp_path, suffix, pack):
    import random
    draw = random.Random(0)
    lines = [json.dumps({"text": f"{i} {draw.random()}"}) for i in range(20_000)]
    packed = pack("\n".join(lines).encode())
    (tmp_path / f"t.jsonl{suffix}").write_bytes(packed[:len(packed) // 2])
    (tmp_path / f"u.jsonl{suffix}").write_bytes(pack(GOOD[0]))
    source = {"kind": "jsonl", "name": "z", "path": str(tmp_path)}
    config = make_config(tmp_path / "d", sources=[source], splits={}, block_tokens=4096)
    # How much is gone nobody knows. One document, as it was once counted, let any cut archive pass.
    with pytest.raises(DataCorruption, match=r"max_bad_fraction allows 0\.05; most are unreadable"):
        prepare(config)
    counts, quarantine = outcome(prepare(config.model_copy(update={"max_bad_fraction": 0.6})))
    assert counts["kept"] > 1000
    assert counts["unreadable"] == counts["kept"] - 1  # as many as were read of the file
    assert quarantine == [("unreadable", f"t.jsonl{suffix}", counts["kept"])]


def test_rows_of_tables_that_do_not_fit_the_header_are_named(make_config, tmp_path):
    rows = ["id,text", *(f"{i},text number {i}" for i in range(60))]
    rows[20], rows[30] = "20", "30,a,b"
    rows[40:42] = ['40,"spans', 'two lines"', "41,x"]
    (tmp_path / "t.csv").write_bytes("\n".join(rows).encode() + b"\n60,caf\xe9\n61,nul\x00\n")
    source = {"kind": "table", "name": "t", "path": str(tmp_path / "t.csv")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=0.1))
    counts, quarantine = outcome(manifest)
    assert quarantine == [("bad_row", "t.csv", 21), ("bad_row", "t.csv", 31), ("not_utf8", "t.csv", 63),
                          ("nul_bytes", "t.csv", 64)]
    assert counts["kept"] == 58


def test_too_much_damage_is_fatal_with_code_3_and_loses_no_work(make_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*GOOD[:90], *[b"{broken"] * 10]))
    (tmp_path / "config.yaml").write_text(
        f"out: {tmp_path / 'd'}\nsplits: {{}}\nworkers: 1\ntokenizer: {{vocab_size: 300}}\n"
        f"sources:\n- {{kind: jsonl, name: j, path: {tmp_path / 'in.jsonl'}}}\n")
    monkeypatch.setattr(sys, "argv", ["pretrain", "prep", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == 3
    assert "source j: 10 of 100 documents cannot be read, max_bad_fraction allows 0.05; most are bad_json (10)" in err
    assert '"line": 91' in err and "Traceback" not in err
    units = {p: p.stat().st_mtime_ns for p in (tmp_path / ".d.partial").glob("work/read/*")}
    assert units
    config = make_config(tmp_path / "d", sources=[{"kind": "jsonl", "name": "j", "path": str(tmp_path / "in.jsonl")}],
                         splits={}, tokenizer={"vocab_size": 300}, block_tokens=16384, blocks_per_shard=None)
    with pytest.raises(DataCorruption):
        prepare(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / ".d.partial").glob("work/read/*")} == units
    assert prepare(config.model_copy(update={"max_bad_fraction": 0.1})).splits["train"].docs == 90


def test_empty_documents_are_counted_but_are_no_damage(make_config, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([GOOD[0], *[b'{"text": " "}'] * 9]))
    source = {"kind": "jsonl", "name": "j", "path": str(tmp_path / "in.jsonl")}
    counts, quarantine = outcome(prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=0)))
    assert counts == {"kept": 1, "empty": 9}
    assert len(quarantine) == 9


@pytest.mark.parametrize("source", [{"kind": "pair_table", "negatives": ["negative"]},
                                    {"kind": "pair_preset", "preset": "msmarco_triplets", "validation_queries": 0}])
def test_pairs_with_an_empty_field_are_dropped_and_are_no_damage(make_config, tmp_path, source):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(6)]
    rows += [rows[0] | {name: " "} for name in rows[0]] * 3
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = source | {"name": "p", "path": str(tmp_path / "p.jsonl")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=0))
    counts = {name: entry["documents"] for name, entry in manifest.provenance["counts"]["p"].items()}
    assert counts.pop("kept") == 6 and sum(counts.values()) == 9
    assert len((tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()) == 9


def test_a_row_without_the_column_of_its_pair_is_damage(make_config, tmp_path):
    rows = [{"query": f"q{i}", "positive" if i < 6 else "answer": f"p{i}"} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "pair_table", "name": "p", "path": str(tmp_path / "p.jsonl")}
    with pytest.raises(DataCorruption, match=r'3 of 9 .*no_column.*no .*positive.*; it has query, answer'):
        prepare(make_config(tmp_path / "d", sources=[source], splits={}))


@pytest.mark.parametrize("first", ["query-id\tcorpus-id\tscore\n", "q0\td0\tx\n", "q0\td0\n", "q0\td0\t1\n", ""])
def test_judgements_are_numbers_texts_are_text_and_only_a_header_is_passed_over(make_config, tmp_path, first):
    (tmp_path / "qrels").mkdir()
    bad = [{"title": 7, "text": "t"}, {"text": ["a", "b"]}, {"text": 3}, {"text": []}, {"title": 0, "text": "t"}]
    corpus = [{"_id": f"d{i}", "title": "T", "text": f"passage {i}"} for i in range(6)]
    corpus += [{"_id": f"bad{i}"} | fields for i, fields in enumerate(bad)] + [{"text": "no id"}, {"_id": [1]}]
    queries = [{"_id": i, "text": f"question {i}"} for i in range(9)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels" / "train.tsv").write_text(
        first + "0\td1\t1.0\n1\td2\t 2\n2\td3\t0.0\n3\td4\tnan\n4\td5\tinf\n5\td5\tyes\n"
        + "".join(f"6\tbad{i}\t1\n" for i in range(len(bad))))
    source = {"kind": "beir", "name": "b", "path": str(tmp_path)}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=1))
    counts = {reason: entry["documents"] for reason, entry in manifest.provenance["counts"]["b"].items()}
    lines = [(entry["path"], entry["line"]) for entry in
             map(json.loads, (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines())
             if entry["reason"] == "bad_row"]
    start = bool(first)
    unknown = first.endswith("\t1\n")  # a judgement of a query that is not there
    expected = [("qrels/train.tsv", 1)] * (first.startswith("q0") and not unknown)
    expected += [("qrels/train.tsv", start + i) for i in (4, 5, 6)] + [("corpus.jsonl", i) for i in range(7, 14)]
    assert lines == expected
    assert counts == {"kept": 2, "bad_row": len(lines), "unknown_id": len(bad) + unknown}
