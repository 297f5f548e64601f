"""From text to shards: what is in them, and that nothing but config and sources decides it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer

from data_prep import build, plan
from data_prep.config import PrepConfig
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare
from data_prep.split import Splitter, digest_of
from data_prep.stats import split_stats, stored_documents
from pretrain.errors import ConfigError, UserError


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def expected_splits(corpus: Path) -> dict[str, dict[str, str]]:
    """Slow reference: split -> {path: text}, first copies in path order."""
    splitter = Splitter({"val": 0.15, "test": 0.1}, 0)
    seen: set[bytes] = set()
    found: dict[str, dict[str, str]] = {"train": {}, "val": {}, "test": {}}
    for name in sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*.txt")):
        try:
            text = (corpus / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        digest = digest_of(text.encode())
        if text.strip() and digest not in seen:
            seen.add(digest)
            found[splitter.split_of(digest)][name] = text
    return found


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_shards_hold_each_split_token_for_token_as_webdataset_reads_it(dataset, corpus, name):
    manifest = Manifest.load(dataset)
    split = manifest.split(name)
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = expected_splits(corpus)[name]
    expected = [[*tokenizer.encode(text).ids, manifest.eos_id] for text in texts.values()]
    urls = [str(split.tar_path(i)) for i in range(split.n_shards)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert np.concatenate([s["tokens.npy"] for s in samples]).tolist() == [i for ids in expected for i in ids]
    stored = list(stored_documents(split))
    assert [d.tokens.tolist() for d in stored] == expected
    assert [d.provenance for d in stored] == [{"source": "notes", "path": path} for path in texts]
    assert [d.utf8_bytes for d in stored] == [len(t.encode()) for t in texts.values()]
    assert split.docs == len(texts)
    assert split.bytes == sum(len(t.encode()) for t in texts.values())
    assert len(texts) > 3


def test_stored_documents_start_at_any_document(dataset):
    split = Manifest.load(dataset).split("train")
    def read(offset):
        return [(d.position, d.tokens.tolist(), d.provenance) for d in stored_documents(split, offset)]
    every = read(0)
    assert [position for position, _, _ in every] == list(range(split.docs))
    for offset in range(0, split.docs, 7):
        assert read(offset) == every[offset:]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_stats_equal_a_count_of_the_documents(dataset, name):
    manifest = Manifest.load(dataset)
    stats = split_stats(manifest, name)
    lengths = [len(d.tokens) for d in stored_documents(manifest.split(name))]
    assert (stats.documents, stats.tokens, stats.longest) == (len(lengths), sum(lengths), max(lengths))
    for i, count in enumerate(stats.histogram):
        assert count == sum(2**i <= n < 2**(i + 1) for n in lengths)
    assert stats.by_source == {"notes": (stats.documents, stats.bytes)}


def test_workers_and_reruns_do_not_show_in_the_bytes(dataset, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CHUNK_BYTES", 3000)  # many units
    monkeypatch.setattr(plan, "PIECE_BYTES", 10_000)
    manifest = prepare(make_config(tmp_path / "two", workers=2))
    assert hashes(tmp_path / "two") == hashes(dataset)
    assert manifest.fingerprint == Manifest.load(dataset).fingerprint


def test_counts_and_quarantine_name_what_was_left_out(dataset):
    counts = Manifest.load(dataset).provenance["counts"]["notes"]
    assert {reason: n["documents"] for reason, n in counts.items()} == {
        "kept": 120, "duplicate": 3, "empty": 1, "not_utf8": 1}
    lines = [json.loads(line) for line in (dataset / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"source": "notes", "path": "b/z3.txt", "reason": "empty", "detail": "4 bytes"},
        {"source": "notes", "path": "b/z4.txt", "reason": "not_utf8", "detail": "byte 0xe9 at offset 3"}]


def test_transformers_loads_the_tokenizer(dataset):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(dataset)
    manifest = Manifest.load(dataset)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", manifest.eos_id)
    assert (theirs.pad_token, theirs.pad_token_id) == ("<|pad|>", 1)
    assert len(theirs) == manifest.vocab_size
    text = "return  self\n\tnaïve 日本語"
    ours = Tokenizer.from_file(str(dataset / "tokenizer.json")).encode(text).ids
    assert theirs(text)["input_ids"] == ours
    assert theirs.decode(ours) == text


def test_a_complete_dataset_is_left_alone_and_another_config_refused(dataset, make_config):
    before = {p.name: p.stat().st_mtime_ns for p in dataset.iterdir()}
    prepare(make_config(dataset, workers=2))
    assert {p.name: p.stat().st_mtime_ns for p in dataset.iterdir()} == before
    for changes, key in [({"block_tokens": 128}, "block_tokens was 64, now 128"),
                         ({"splits": {"val": 0.2, "test": 0.1}}, "splits.val was 0.15, now 0.2"),
                         ({"splits": {"test": 0.1, "val": 0.15}}, "split_order"),
                         ({"tokenizer": {"vocab_size": 401}}, "tokenizer.vocab_size was 400, now 401"),
                         ({"sources": [{"kind": "text", "name": "notes", "path": str(dataset)}]}, "paths.notes was")]:
        with pytest.raises(UserError, match=key):
            prepare(make_config(dataset, **changes))
    assert {p.name: p.stat().st_mtime_ns for p in dataset.iterdir()} == before


def test_overwrite_replaces_datasets_and_nothing_else(make_config, tmp_path, corpus):
    few = [{"kind": "text", "name": "notes", "path": str(corpus), "max_documents": 40}]
    first = prepare(make_config(tmp_path / "d", sources=few))
    second = prepare(make_config(tmp_path / "d", sources=few, seed=1), overwrite=True)
    assert second.fingerprint != first.fingerprint == first.fingerprint
    assert Manifest.load(tmp_path / "d").fingerprint == second.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("two years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is no dataset"):
            prepare(make_config(other), overwrite=overwrite)
    assert (other / "chapter1.tex").read_text() == "two years of work"


SCRIPT = """
import os, signal, sys
from data_prep import build, decide, pack, pipeline, plan, read_stage, workfolder
from data_prep.config import PrepConfig
if __name__ == "__main__":
    def at(module, name, calls):
        real, left = getattr(module, name), [calls]
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(module, name, step)
    build.CHUNK_BYTES, plan.PIECE_BYTES = 3000, 10_000
    config = PrepConfig.model_validate_json(sys.argv[1])
    place, calls = sys.argv[2].split(":")
    places = {"push": (pack.ShardWriter, "push"), "pair": (pack.PairWriter, "push"),
              "read": (read_stage, "write_unit"), "decide": (decide, "_count"), "train": (build, "train_tokenizer"),
              "publish": (pipeline, "publish_dataset"), "rename": (os, "rename")}
    at(*places[place], int(calls))
    pipeline.prepare(config, overwrite=True)
"""


def killed(config: PrepConfig, place: str, script: Path) -> None:
    """Run preparation in a process that kills itself at a place."""
    script.write_text(SCRIPT)
    # The pipe closes when the last process that holds it is gone: a worker left behind is a timeout here.
    done = subprocess.run([sys.executable, str(script), config.model_dump_json(), place], timeout=150, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    script.unlink()


@pytest.mark.parametrize("place, workers", [("read:3", 1), ("decide:0", 1), ("train:0", 1), ("push:60", 2),
                                            ("publish:0", 1), ("rename:1", 1)])
def test_a_killed_run_leaves_no_half_dataset_and_the_next_one_is_whole(dataset, make_config, tmp_path, place, workers):
    out = tmp_path / "d"
    config = make_config(out, workers=workers)
    if place == "rename:1":  # dies between taking the old dataset away and putting the new one there
        shutil.copytree(dataset, out)
    killed(config, place, tmp_path / "killed.py")
    with pytest.raises(UserError, match="no dataset here"):
        Manifest.load(out)
    partial = tmp_path / ".d.partial"
    assert partial.is_dir()
    if place == "push:60":
        assert list(partial.glob("*.tar"))
    if place in ("read:3", "push:60"):
        with pytest.raises(UserError, match="no dataset here"):
            Manifest.load(partial)
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("work/*/[0-9]*.unit")}
    finished |= {path: path.stat().st_mtime_ns for path in partial.glob("[a-z]*.tar")}
    assert place in ("publish:0", "rename:1") or len(finished) >= 3
    touched = []
    prepare(config, reporter=Watch(lambda: touched.extend(
        path for path, time in finished.items() if path.exists() and path.stat().st_mtime_ns != time)))
    assert not touched
    assert hashes(out) == hashes(dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


class Watch:
    """A reporter that looks at the folder at every report."""

    def __init__(self, look):
        self.look = look

    def stage(self, name, total_bytes):
        self.look()

    def advance(self, size):
        self.look()


def test_two_runs_on_one_folder_are_refused(make_config, tmp_path):
    import fcntl
    (tmp_path / ".d.partial").mkdir()
    descriptor = os.open(tmp_path / ".d.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(make_config(tmp_path / "d"))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("changes, message", [
    ({"sources": [{"kind": "text", "name": "x", "path": "/nowhere/at/all"}]}, r"sources\.0\.path: /nowhere/at/all"),
    ({"sources": [{"kind": "text", "name": "x", "path": "CORPUS", "glob": "*.md"}]}, r"0\.glob: no file.*\*\.md"),
    ({"sources": [{"kind": "text", "name": "x", "path": "CORPUS", "glob": "**.md"}]}, r"sources\.0\.glob"),
    ({"sources": [{"kind": "text", "name": "x", "path": "CORPUS", "glob": "b/z3.txt"}]}, "no document for split train"),
    ({"tokenizer": {"path": "/nowhere/tokenizer.json"}}, r"tokenizer\.path: /nowhere"),
    ({"tokenizer": {"path": "CORPUS/a/001.txt"}}, r"tokenizer\.path: .*001\.txt: no tokenizer"),
    ({"tokenizer": {"path": "DATASET/tokenizer.json", "eos_token": "</s>"}}, r"tokenizer\.eos_token: .*<\|endof"),
])
def test_bad_input_is_one_line_and_leaves_nothing(make_config, corpus, dataset, tmp_path, changes, message):
    text = json.dumps(changes).replace("CORPUS", str(corpus)).replace("DATASET", str(dataset))
    with pytest.raises(UserError, match=message):
        prepare(make_config(tmp_path / "d", **json.loads(text)))
    assert list(tmp_path.iterdir()) == []


def test_a_source_never_reads_the_dataset_it_makes(make_config, tmp_path):
    (tmp_path / "notes.txt").write_text("words " * 50)
    (tmp_path / "more.jsonl").write_text('{"text": "more words"}\n{"text": broken\n')
    source = {"kind": "jsonl", "name": "all", "path": str(tmp_path)}
    config = make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=0.5)
    assert prepare(config).splits["train"].docs == 1
    assert (tmp_path / "d" / "quarantine.jsonl").stat().st_size > 0
    with pytest.raises(ConfigError, match=r"sources\.0: .*quarantine.jsonl lies inside the dataset"):
        prepare(config, overwrite=True)
    assert Manifest.load(tmp_path / "d").splits["train"].docs == 1


@pytest.mark.parametrize("changes, message", [
    ({"splits": {"val": 0.6, "test": 0.4}}, "leaves nothing for train"),
    ({"splits": {"train": 0.5}}, "train is what the others leave"),
    ({"splits": {"../x": 0.5}}, "use lower-case letters"),
    ({"splits": {"val": 1.5}}, "between 0 and 1"),
    ({"sources": [{"kind": "stdlib"}, {"kind": "stdlib"}]}, 'two sources are called "stdlib"'),
    ({"sources": [{"kind": "stdlib", "name": "a b"}]}, "use letters, digits"),
    ({"tokenizer": {"eos_token": "<|pad|>"}}, "the two must differ"),
])
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepConfig.model_validate({"out": "x", "sources": [{"kind": "stdlib"}]} | changes)


def test_preparation_needs_no_torch():
    rooms = "data_prep.pipeline, data_prep.verify, data_prep.stats, pretrain.cli.prep, pretrain.cli.data"
    code = f"import sys, {rooms}; print({{'torch', 'transformers', 'deepspeed', 'webdataset'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


