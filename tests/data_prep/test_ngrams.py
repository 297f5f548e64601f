"""The n-gram index against a slow reference: what is found, covered and counted, in any order and batching."""

import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.ngrams import GramCounts, NgramIndex, WholeItems
from data_prep.words import check_hashes, excerpt, ngram_hashes, word_hashes

TEXT = st.lists(st.sampled_from(["a", "b", "c", "dd", "E!", "é", "日", "\n", "x-y"]), max_size=30).map(" ".join)


def words_of(text: str) -> list[str]:
    """Slow reference of a word: runs of letters, digits and marks; Han characters one by one."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return re.findall(r"[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])[^\W_])+", text)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(texts=st.lists(TEXT, max_size=8))
def test_words_have_equal_hashes_where_they_are_equal(texts):
    hashes, bounds = word_hashes(texts)
    expected = [words_of(text) for text in texts]
    assert np.diff(bounds).tolist() == list(map(len, expected))
    flat = [word for words in expected for word in words]
    assert len(set(hashes.tolist())) == len(set(flat))
    assert {(h, w) for h, w in zip(hashes.tolist(), flat, strict=True)} == set(
        {w: (h, w) for h, w in zip(hashes.tolist(), flat, strict=True)}.values())


def test_hashes_do_not_depend_on_neighbours_and_are_stable(monkeypatch):
    texts = ["The quick brown fox", "", "naïve NAI\u0308VE", "東京 tower", "x" * 300, "word " * 400]
    together, bounds = word_hashes(texts)
    for i, text in enumerate(texts):
        assert word_hashes([text])[0].tolist() == together[bounds[i]:bounds[i + 1]].tolist()
    assert together[bounds[2]] == together[bounds[2] + 1]
    from data_prep import words
    monkeypatch.setattr(words, "BLOCK_CHARS", 64)  # long texts are cut after separators
    pieces, _ = word_hashes(texts[:4] + texts[5:])
    assert pieces.tolist() == np.concatenate([together[:bounds[4]], together[bounds[5]:]]).tolist()
    # Stored values: a change of them would void every index on a disk.
    assert together[:2].tolist() == STORED_WORDS
    assert ngram_hashes(together[:4], np.array([0, 4]), 3)[0].tolist() == STORED_TRIGRAMS


STORED_WORDS = [8894368323613403534, 2357726863971602985]
STORED_TRIGRAMS = [14188061904935805380, 11392239260411630040]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(items=st.lists(TEXT, min_size=1, max_size=6), corpus=st.lists(TEXT, max_size=10), n=st.integers(2, 5),
       limit=st.integers(1, 3), draw=st.randoms(use_true_random=False))
def test_matches_coverage_and_boilerplate_equal_a_slow_search(items, corpus, n, limit, draw):
    grams = [slow_grams(text, n) for text in items]
    found = [slow_grams(text, n) for text in corpus]
    documents = {gram: sum(gram in other for other in found) for gram in {g for gs in grams for g in gs}}
    expected = []
    for number, text in enumerate(items):
        words = words_of(text)
        matched = [documents[gram] > 0 and (documents[gram] <= limit or gram[0] == "whole") for gram in grams[number]]
        covered = {i + k for i, hit in enumerate(matched) if hit for k in range(min(n, len(words)))}
        runs = "".join("x" if hit else " " for hit in matched).split()
        if covered:
            expected.append((number, len(covered) / len(words), max(map(len, runs)) + min(n, len(words)) - 1))
    index = NgramIndex.build(n, [word_hashes(items[:2]), word_hashes(items[2:])])
    counts, whole = GramCounts(index), WholeItems(index)
    draw.shuffle(corpus)
    for at in range(0, len(corpus), 3):
        hits = index.probe(*word_hashes(corpus[at:at + 3]))
        counts.add(hits)
        whole.add(hits)
    assert whole.found.tolist() == [any(stands_whole(words_of(text), words_of(other), n) for other in corpus)
                                    for text in items]
    overlaps = index.overlaps(counts.matched(limit))
    assert [(o.item, pytest.approx(o.coverage), o.run) for o in overlaps] == expected
    for overlap in overlaps:
        words = words_of(items[overlap.item])[overlap.first:overlap.first + overlap.run]
        assert words_of(excerpt(items[overlap.item], overlap.first, overlap.run)) == words


def stands_whole(words: list[str], other: list[str], n: int) -> bool:
    if len(words) < n:
        return bool(words) and words == other
    return any(other[i:i + len(words)] == words for i in range(len(other) - len(words) + 1))


def slow_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """n-grams of a text; one of the whole text, marked as such, where it is shorter."""
    words = words_of(text)
    if 0 < len(words) < n:
        return [("whole", *words)]
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def test_one_document_is_judged_by_its_own_ngrams():
    item = " ".join(f"w{i}" for i in range(100))
    words = item.split()
    index = NgramIndex.build(13, [word_hashes([item, "other text of no interest"])])
    document = " ".join(["before", *words[20:60], "between", *words[70:90], "after"])
    hits = index.probe(*word_hashes([document]))
    (overlap,) = index.judge(hits.grams)
    assert (overlap.item, overlap.coverage, overlap.run, overlap.first) == (0, 0.6, 40, 20)
    assert hits.positions.tolist() == [*range(1, 29), *range(42, 50)]


def test_an_index_is_shared_through_files(tmp_path):
    items = [f"some words of item number {i} and a few more of them to make it long enough {i}" for i in range(50)]
    index = NgramIndex.build(5, [word_hashes(items)])
    index.save(tmp_path / "index")
    loaded = NgramIndex.load(tmp_path / "index")
    hits, again = (i.probe(*word_hashes(items[::-1])) for i in (index, loaded))
    assert again.grams.tolist() == hits.grams.tolist()
    assert (loaded.n, loaded.n_items, loaded.n_grams) == (index.n, 50, index.n_grams)


def test_equal_hashes_of_other_ngrams_are_told_apart_by_the_second():
    words, bounds = word_hashes(["one two three four five six", "seven eight nine ten"])
    index = NgramIndex.build(3, [(words, bounds)])
    forged = NgramIndex(3, np.zeros(index.n_grams, np.uint64), np.sort(index.checks), index.grams, index.bounds,
                        index.lengths)
    forged.hashes[:] = ngram_hashes(words, bounds, 3)[0][2]  # six n-grams with one hash, as never happens
    forged = NgramIndex(3, forged.hashes, forged.checks, index.grams, index.bounds, index.lengths)
    hits = forged.probe(words, bounds)
    expected = check_hashes(words, bounds, 3, np.array([0]), np.array([2]))[0]
    assert [int(forged.checks[g]) for g in hits.grams] == [int(expected)]
    assert hits.positions.tolist() == [2]


@pytest.mark.parametrize("run", [13, 50, 512])
def test_planted_copies_are_found_at_any_offset_and_random_text_is_not(run):
    draw = random.Random(run)
    fresh = iter(range(10**9))
    def noise(count):
        return [f"n{next(fresh)}" for _ in range(count)]
    items, documents = [], []
    for offset in range(20):
        copied = noise(run)
        items.append(" ".join(noise(offset) + copied + noise(5)))
        documents.append(" ".join(noise(draw.randrange(3000)) + copied + noise(draw.randrange(40))))
    index = NgramIndex.build(13, [word_hashes(items)])
    counts = GramCounts(index)
    counts.add(index.probe(*word_hashes(documents)))
    found = index.overlaps(counts.matched(10))
    assert [(o.item, o.run) for o in found] == [(i, run) for i in range(20)]
    assert [o.first for o in found] == list(range(20))
    unrelated = index.probe(*word_hashes([" ".join(noise(20_000))]))
    assert len(unrelated.grams) == 0
