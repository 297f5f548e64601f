"""Copies and splits depend on a document's own text, and the first copy in the order of the sources is kept."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.split import Splitter, digest_of
from data_prep.stats import stored_documents

TEXT = st.text(min_size=1).filter(lambda t: t.strip())


def kept_of(folder: Path, *names: str, exact=True, seed=0) -> dict[tuple[str, str], str]:
    """(source, path) -> split of everything that is kept."""
    manifest = prepare(PrepConfig.model_validate({
        "out": str(folder / f"out-{'-'.join(names)}-{exact}-{seed}"), "seed": seed, "dedup": {"exact": exact},
        "splits": {"val": 0.3, "test": 0.2}, "workers": 1, "tokenizer": {"vocab_size": 258},
        "sources": [{"kind": "text", "name": name, "path": str(folder / name)} for name in names]}))
    return {(d.provenance["source"], d.provenance["path"]): split for split in manifest.splits
            for d in stored_documents(manifest.split(split))}


def test_a_document_keeps_its_split_whatever_else_the_corpus_holds(tmp_path):
    for i in range(60):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    alone = kept_of(tmp_path, "b")
    assert set(alone.values()) == {"train", "val", "test"}
    assert alone.items() <= kept_of(tmp_path, "a", "b").items()
    assert kept_of(tmp_path, "b", seed=1) != alone


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**63 - 1))
def test_a_split_added_last_takes_from_train_only(digest, seed):
    before = Splitter({"val": 0.1}, seed).split_of(digest)
    after = Splitter({"val": 0.1, "test": 0.2}, seed).split_of(digest)
    assert after == before or (before, after) == ("train", "test")


def test_shares_are_met():
    splitter = Splitter({"val": 0.1, "test": 0.05}, 3)
    splits = [splitter.split_of(digest_of(str(i).encode())) for i in range(20_000)]
    assert splits.count("val") == pytest.approx(2000, abs=4 * 1800**0.5)
    assert splits.count("test") == pytest.approx(1000, abs=4 * 950**0.5)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(TEXT)
def test_copies_are_equal_but_for_line_ends_and_outer_white_space(text):
    plain = text.replace("\r\n", "\n")
    variants = [plain, plain.replace("\n", "\r\n"), "\ufeff" + plain, "\n " + plain + "\t\n"]
    digests = {digest_of(v.encode()) for v in variants[:2]} | {digest_of(v.encode()) for v in variants[2:]}
    assert len(digests) == 1
    assert digest_of((plain.strip() + "x").encode()) not in digests


def test_the_first_copy_in_source_order_is_kept(tmp_path):
    for name, text in [("a/2.txt", "one"), ("a/1.txt", "two"), ("b/1.txt", "one\n"), ("b/2.txt", "three")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(kept_of(tmp_path, "a", "b")) == {("a", "1.txt"), ("a", "2.txt"), ("b", "2.txt")}
    assert set(kept_of(tmp_path, "b", "a")) == {("b", "1.txt"), ("b", "2.txt"), ("a", "1.txt")}
    assert len(kept_of(tmp_path, "a", "b", exact=False)) == 4
