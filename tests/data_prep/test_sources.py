"""Sources keep their order, give each document so that it is found again, and set aside what they cannot read."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest
import zstandard

from data_prep.reading import SetAside
from data_prep.source_config import FolderSource, JsonlSource, StdlibSource
from data_prep.sources import Document, read_source

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
