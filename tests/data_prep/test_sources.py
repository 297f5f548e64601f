"""Sources keep their order, give each document so that it is found again, and set aside what they cannot read."""

import csv
import gzip
import io
import json
import os
import random
import sysconfig
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep import plan
from data_prep.config import PrepConfig
from data_prep.reading import FilePart, SetAside
from data_prep.source_config import (
    FolderSource,
    HubDataset,
    HubSource,
    JsonlSource,
    MarkdownSource,
    ParquetSource,
    PythonSource,
    StdlibSource,
    TableSource,
    TarSource,
)
from data_prep.sources import Document, read_parts, read_source
from pretrain.errors import ConfigError

RECORDS = [{"text": "first", "x": 1}, {"text": "ünïcode\nlines"}, {"text": "third"}]


def jsonl(tmp_path, content: bytes, suffix="", limit=1 << 20) -> list[Document | SetAside]:
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(content)
    return list(read_source(JsonlSource(name="j", path=str(path)), 0, limit))


@pytest.mark.parametrize("suffix, pack", [("", lambda b: b), (".gz", gzip.compress), (".zst", zstandard.compress),
                                          (".zst", lambda b: zstandard.compress(b[:30]) + zstandard.compress(b[30:]))])
def test_jsonl_is_read_plain_and_compressed_and_each_document_found_again(tmp_path, suffix, pack):
    plain = "".join(json.dumps(r, ensure_ascii=i != 1) + "\n" for i, r in enumerate(RECORDS)).encode()
    found = jsonl(tmp_path, pack(plain), suffix)
    assert [d.text.decode() for d in found] == [r["text"] for r in RECORDS]
    for document in found:
        at = document.provenance["offset"]
        assert json.loads(plain[at:].split(b"\n")[0])["text"] == document.text.decode()
        assert json.loads(plain.split(b"\n")[document.provenance["line"] - 1])["text"] == document.text.decode()


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "caf\xe9"}', "not_utf8"), (b'{"text": "\\ud800"}', "not_utf8"), (b'{"text": ', "bad_json"),
    (b'{"txt": "a"}', "no_text"), (b'{"text": 3}', "no_text"), (b"[1]", "no_text"), (b'{"text": " \\n"}', "empty"),
    (b'{"text": "' + b"a" * 200 + b'"}', "too_large"), (b'{"text": "' + b"a" * (2 << 20) + b'"}', "too_large")])
def test_a_bad_line_is_set_aside_and_the_next_one_read(tmp_path, line, reason):
    before, bad, after = jsonl(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}', limit=100)
    assert (before.text, after.text) == (b"a", b"b")
    assert (bad.reason, bad.provenance["line"], bad.provenance["offset"]) == (reason, 2, 14)
    assert after.provenance["line"] == 3


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_cut_short_gives_what_is_whole_and_is_named(tmp_path, suffix, pack):
    import random
    draw = random.Random(0)
    lines = [json.dumps({"text": f"{i} {draw.random()}"}) for i in range(20_000)]
    packed = pack("\n".join(lines).encode())
    found = jsonl(tmp_path, packed[:len(packed) // 2], suffix)
    assert isinstance(found[-1], SetAside)
    assert (found[-1].reason, found[-1].provenance["path"]) == ("unreadable", f"d.jsonl{suffix}")
    texts = [json.loads(line)["text"].encode() for line in lines]
    assert [d.text for d in found[:-1]] == texts[:len(found) - 1]
    assert jsonl(tmp_path, b"no archive", suffix)[-1].reason == "unreadable"


def test_limits_stop_a_source(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("x" * 10)
    def count(**limits):
        return len(list(read_source(FolderSource(name="t", path=str(tmp_path), **limits), 0, 1 << 20)))
    assert (count(), count(max_documents=4), count(max_bytes=35)) == (9, 4, 3)


def test_hidden_files_are_left_out_and_any_file_name_is_kept(tmp_path):
    for name in (b".hidden/a.txt", b"b/.c.txt", b"b/d.txt", b"caf\xe9.txt", "ä.txt".encode()):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    names = [d.provenance["path"] for d in read_source(FolderSource(name="t", path=str(tmp_path)), 0, 1 << 20)]
    assert names == ["b/d.txt", "caf\\xe9.txt", "ä.txt"]


def test_the_standard_library_is_this_interpreters_without_installed_packages():
    texts = {item.provenance["path"]: getattr(item, "text", b"") for item in read_source(StdlibSource(), 0, 1 << 26)}
    names = list(texts)
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not any("site-packages" in n or "dist-packages" in n for n in names)
    assert texts["abc.py"] == (Path(sysconfig.get_paths()["stdlib"]) / "abc.py").read_bytes()


def read(source, limit=1 << 20) -> list[Document | SetAside]:
    return list(read_source(source, 0, limit))


TEXTS = ["one, two", 'a "quoted"\nline', "naïve 日本", "last"]


@pytest.mark.parametrize("name, pack", [("t.csv", bytes), ("t.csv.gz", gzip.compress), ("t.tsv", bytes),
                                        ("t.csv.zst", zstandard.compress)])
def test_tables_give_their_text_column(tmp_path, name, pack):
    texts = TEXTS if ".csv" in name else [t.replace("\n", " ").replace('"', "'") for t in TEXTS]
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if ".tsv" in name else ",", lineterminator="\n")
    writer.writerows([["id", "body"], *enumerate(texts)])
    (tmp_path / name).write_bytes(pack(out.getvalue().encode()))
    found = read(TableSource(name="t", path=str(tmp_path), text_field="body"))
    assert [d.text.decode() for d in found] == texts
    lines = out.getvalue().split("\n")
    for document, text in zip(found, texts, strict=True):
        assert text.split("\n")[0].rstrip('"') in lines[document.provenance["line"] - 1].replace('""', '"')


def test_parquet_is_read_whole_and_by_row_groups(tmp_path):
    table = pyarrow.table({"n": list(range(40)), "body": [f"text {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    source = ParquetSource(name="p", path=str(tmp_path), text_field="body")
    whole = read(source)
    assert [(d.text.decode(), d.provenance["row"]) for d in whole] == [(f"text {i}", i) for i in range(40)]
    size = (tmp_path / "a.parquet").stat().st_size
    parts = [FilePart("a.parquet", tmp_path / "a.parquet", size, 2, 4, 14)]
    assert list(read_parts(source, 0, parts, 1 << 20)) == whole[14:28]


def test_markdown_loses_front_matter_and_comments_only(tmp_path):
    (tmp_path / "a.md").write_text("---\ntitle: x\ntags: [y]\n---\n# Head\n\n<!-- todo\nlater -->text\n\n---\n\nmore\n")
    (tmp_path / "b.md").write_text("---\n\nA rule, no front matter.\n\n---\nrest\n")
    found = [d.text.decode() for d in read(MarkdownSource(name="m", path=str(tmp_path)))]
    assert found == ["# Head\n\ntext\n\n---\n\nmore\n", "---\n\nA rule, no front matter.\n\n---\nrest\n"]


def test_python_trees_are_read_without_caches(tmp_path):
    for name in ("pkg/a.py", "pkg/__pycache__/b.py", "pkg/c.txt", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    assert [d.provenance["path"] for d in read(PythonSource(name="p", path=str(tmp_path)))] == ["pkg/a.py"]
    installed = next(iter(read_source(PythonSource(name="p"), 0, 1 << 26)))
    assert (Path(sysconfig.get_paths()["purelib"]) / installed.provenance["path"]).read_bytes() == installed.text


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_read_from_disk_and_from_local_files(tmp_path, monkeypatch, streaming):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict({"body": TEXTS, "n": [1, 2, 3, 4]})
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    saved = HubDataset(path=str(tmp_path / "saved"), split="train", streaming=streaming)
    files = HubDataset(path="json", data_files=[str(tmp_path / "rows.jsonl")], streaming=streaming)
    for dataset in (saved, files):
        found = read(HubSource(name="h", dataset=dataset, text_field="body"))
        assert [d.text.decode() for d in found] == TEXTS
        assert [d.provenance for d in found] == [{"source": "h", "row": i} for i in range(4)]
    part = FilePart("", Path(), 0, 1, 3)
    source = HubSource(name="h", dataset=saved, text_field="body")
    assert [d.text.decode() for d in read_parts(source, 0, [part], 99)] == TEXTS[1:3]
    with pytest.raises(ConfigError, match=r"sources\.0\.dataset: /nowhere/at/all: cannot be opened"):
        read(HubSource(name="h", dataset=HubDataset(path="/nowhere/at/all")))


def test_tars_give_their_members_and_never_touch_a_path(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        def add(name, content=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
        add("x/0001.txt", b"first")
        add("x/0001.json", json.dumps({"text": "as json"}).encode())
        add("../../escape.txt", b"second")
        add("link.txt", kind=tarfile.SYMTYPE)
        add("0003.txt", b"caf\xe9")
        add("0004.json", b"{broken")
    def shown(items):
        return [item.reason if isinstance(item, SetAside) else item.text.decode() for item in items]
    source = TarSource(name="w", path=str(tmp_path))
    found = read(source)
    assert shown(found) == ["first", "second", "no_file", "not_utf8", "no_member"]
    assert found[0].provenance == {"source": "w", "path": "a.tar", "key": "x/0001", "sample": 0}
    assert shown(read(source.model_copy(update={"member": "json"}))) == ["as json", *["no_member"] * 3, "bad_json"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    path.write_bytes(path.read_bytes()[:1200])
    assert shown(read(source))[0] == "first" and shown(read(source))[-1] == "unreadable"


@pytest.mark.parametrize("piece_bytes", [50, 300, 10**6])
def test_pieces_cover_every_line_once_and_keep_its_number(tmp_path, monkeypatch, piece_bytes):
    draw = random.Random(piece_bytes)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz"):
        lines = "".join(json.dumps({"text": "x" * draw.randrange(1, 90) + f" {name} {i}"}) + "\n"
                        for i in range(draw.randrange(1, 40)))
        content = (lines if name != "b.jsonl" else lines.rstrip("\n")).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = {"kind": "jsonl", "name": "j", "path": str(tmp_path)}
    config = PrepConfig.model_validate({"out": str(tmp_path / "out"), "sources": [source]})
    monkeypatch.setattr(plan, "PIECE_BYTES", piece_bytes)
    pieces = plan.make_plan(config, plan.list_files(config))
    plan.save_plan(tmp_path / "plan", pieces)
    assert plan.load_plan(tmp_path / "plan") == pieces
    assert len(pieces) == 1 if piece_bytes == 10**6 else len(pieces) > 5
    found = [d for piece in pieces for d in read_parts(config.sources[0], 0, piece.parts, 1 << 20)]
    assert found == read(config.sources[0])
    limited = config.model_copy(update={"sources": [config.sources[0].model_copy(update={"max_documents": 3})]})
    assert len(plan.make_plan(limited, plan.list_files(limited))) == 1


def test_a_small_corpus_is_cut_so_that_many_workers_have_something_to_do(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("x" * 100)
    source = {"kind": "text", "name": "t", "path": str(tmp_path)}
    config = PrepConfig.model_validate({"out": str(tmp_path / "out"), "sources": [source]})

    def sizes(least, pieces):
        monkeypatch.setattr(plan, "LEAST_PIECE_BYTES", least)
        monkeypatch.setattr(plan, "PIECES", pieces)
        return [piece.size for piece in plan.make_plan(config, plan.list_files(config))]
    assert sizes(1000, 256) == [1000] * 4
    assert sizes(10, 8) == [500] * 8
    assert sizes(10**6, 256) == [4000]
