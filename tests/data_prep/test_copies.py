"""Copies, exact and near: found over all sources and splits, in any amount of memory; measured on planted ones."""

import json
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import hashes

from benchmarks.planted import planted as near_copies
from benchmarks.planted import similarity
from data_prep import build, decide
from data_prep.external import Grouper
from data_prep.manifest import Manifest
from data_prep.minhash import band_hashes, jaccard, shingle_sets
from data_prep.pipeline import prepare
from data_prep.stats import stored_documents
from data_prep.words import word_hashes


@settings(deadline=None, derandomize=True, max_examples=40)
@given(keys=st.lists(st.tuples(st.sampled_from([0, 1, 5, 2**62, 2**63 + 1, 2**64 - 1]), st.integers(0, 2)),
                     max_size=80), memory=st.sampled_from([1, 300, 5000, 10**9]))
def test_groups_are_the_same_in_any_memory(tmp_path_factory, keys, memory):
    folder = tmp_path_factory.mktemp("groups")
    expected = defaultdict(list)
    with Grouper(folder, "g", len(keys), memory) as grouper:
        for position, (high, low) in enumerate(keys):
            grouper.add(np.array([high], np.uint64), low, np.array([position]), position % 7)
            expected[high, low].append(position)
        found = [(int(records["high"][a]), int(records["low"][a]), records["position"][a:b].tolist())
                 for records, bounds in grouper.groups() for a, b in pairwise(bounds)]
    assert found == [(*key, at) for key, at in sorted(expected.items()) if len(at) > 1]
    assert list(folder.iterdir()) == []


def test_shingle_sets_have_the_true_similarity():
    draw = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 40))) + ", Été!" for _ in range(60)]
    sets, bounds = shingle_sets(texts)
    for i in range(0, 60, 2):
        a, b = (sets[bounds[j]:bounds[j + 1]] for j in (i, i + 1))
        assert jaccard(a, b) == pytest.approx(similarity(texts[i], texts[i + 1]))
        assert jaccard(a, a) == 1


def test_bands_are_found_as_often_as_theory_says():
    """1 - (1 - s^8)^20, within four standard errors, at similarities around the middle of the curve."""
    draw = random.Random(1)
    pairs = []
    for _ in range(600):
        words = [f"w{draw.randrange(10**6)}" for _ in range(120)]
        other = list(words)
        for at in draw.sample(range(0, 120, 6), 5):
            other[at] = "changed"
        pairs.append((" ".join(words), " ".join(other)))
    first, second = (band_hashes(*word_hashes([p[i] for p in pairs]), 20, 8) for i in (0, 1))
    expected = np.array([1 - (1 - similarity(*p)**8)**20 for p in pairs])
    assert 0.3 < expected.mean() < 0.9
    error = np.sqrt((expected * (1 - expected)).sum())
    assert (first == second).any(axis=1).sum() == pytest.approx(expected.sum(), abs=4 * error)
    assert not band_hashes(*word_hashes(["", "...", "a b"]), 20, 8)[:2].any()


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, list[tuple[str, str, float]]]:
    """1,000 documents in one source and, in the other, a near copy of each, at similarities from 0.4 to 1."""
    root, pairs = tmp_path_factory.mktemp("planted"), near_copies(1000)
    for name, side in (("a", 0), ("b", 1)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": pair[side]}) + "\n" for pair in pairs))
    return root, pairs


def near_config(make_config, root, out, **changes):
    sources = [{"kind": "jsonl", "name": name, "path": str(root / f"{name}.jsonl")} for name in ("a", "b")]
    return make_config(out, sources=sources, dedup={"near": {}}, block_tokens=16384, **changes)


def kept_lines(manifest: Manifest) -> set[tuple[str, int]]:
    return {(d.provenance["source"], d.provenance["line"]) for split in manifest.splits
            for d in stored_documents(manifest.split(split))}


def test_recall_and_precision_on_a_thousand_planted_near_copies(planted, make_config, tmp_path):
    root, pairs = planted
    assert len(pairs) == 1000
    manifest = prepare(near_config(make_config, root, tmp_path / "d"))
    kept = kept_lines(manifest)
    dropped = {("b", i + 1) for i in range(1000)} - kept
    alike = {("b", i + 1) for i, pair in enumerate(pairs) if pair[2] >= 0.8}
    assert len(alike) > 250
    assert len(dropped & alike) / len(alike) >= 0.95
    assert len(dropped & alike) / len(dropped) >= 0.99
    assert {("a", i + 1) for i in range(1000)} <= kept
    made = manifest.provenance
    assert made["counts"]["b"]["near_duplicate"]["documents"] == len(dropped)
    assert made["copies"]["between"] == [
        {"kind": "near_duplicate", "source": "b", "copies_of": "a", "documents": len(dropped)}]
    example = made["examples"]["b"]["near_duplicate"][0]
    assert json.loads(example["detail"].removeprefix("kept: "))["line"] == example["line"]


def test_copies_are_found_across_splits(planted, make_config, tmp_path):
    """With everything of one source in val, its copies leave train."""
    root, pairs = planted
    config = near_config(make_config, root, tmp_path / "d", splits={"val": 0})
    sources = [config.sources[0].model_copy(update={"split": "val"}), config.sources[1]]
    manifest = prepare(config.model_copy(update={"sources": sources}))
    assert manifest.splits["val"].docs == 1000
    train = {d.provenance["line"] for d in stored_documents(manifest.split("train"))}
    alike = {i + 1 for i, pair in enumerate(pairs) if pair[2] >= 0.8}
    assert len(train & alike) / len(alike) <= 0.05
    assert {i + 1 for i, pair in enumerate(pairs) if pair[2] < 0.8} <= train


def test_memory_and_units_do_not_show(planted, make_config, tmp_path, monkeypatch):
    for name in ("a", "b"):
        lines = (planted[0] / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:200]))
    first = near_config(make_config, tmp_path, tmp_path / "one")
    assert prepare(first).provenance["counts"]["b"]["near_duplicate"]["documents"] > 40
    monkeypatch.setattr(build, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(decide, "_MEMORY_SHARE", 10**5)  # dozens of partitions
    prepare(first.model_copy(update={"out": str(tmp_path / "two"), "memory": "100 MB"}))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_family_keeps_its_first_member_and_chains_count(make_config, tmp_path):
    words = [f"w{i}" for i in range(200)]
    def variant(changed):
        return " ".join("x" if i in changed else word for i, word in enumerate(words))
    # Neighbours differ by two words, the ends of the chain by twelve: below the threshold of each other.
    texts = [variant(set(range(10, 10 + 14 * i, 7))) for i in range(7)]
    assert similarity(texts[0], texts[1]) > 0.8 > similarity(texts[0], texts[6])
    lines = [json.dumps({"text": text}) + "\n" for text in ["alone", *texts[::-1], texts[3]]]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    source = {"kind": "jsonl", "name": "c", "path": str(tmp_path / "c.jsonl")}
    manifest = prepare(make_config(tmp_path / "d", sources=[source], splits={}, dedup={"near": {}}))
    assert kept_lines(manifest) == {("c", 1), ("c", 2)}
    assert manifest.provenance["counts"]["c"] == {
        "kept": {"documents": 2, "bytes": 5 + len(texts[6])}, "duplicate": {"documents": 1, "bytes": len(texts[3])},
        "near_duplicate": {"documents": 6, "bytes": sum(map(len, texts[:6]))}}
    assert manifest.provenance["copies"]["largest"][0] == {"copies": 6, "kept": {
        "source": "c", "path": "c.jsonl", "line": 2, "offset": 18}}
