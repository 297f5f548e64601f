"""Packing plans: every place of every document once, samples within their length, nearly as few as there could be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import write_documents

from data_prep.packing import best_fit, load_plan, make_plan, plan_path
from pretrain.errors import DataCorruption, UserError

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def slow_best_fit(sizes, capacity):
    """Bins of plain best-fit decreasing, one item at a time: the fullest bin that has room."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= size]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= size
        else:
            room.append(capacity - size)
    return sorted(room)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(sizes=SIZES, capacity=st.integers(20, 30))
def test_bins_are_those_of_plain_best_fit_decreasing(sizes, capacity):
    bins = best_fit(np.array(sizes), capacity)
    filled = np.bincount(bins, weights=sizes)
    assert filled.max() <= capacity and filled.min() >= 1
    assert sorted((capacity - filled).astype(int).tolist()) == slow_best_fit(sizes, capacity)
    firsts = [int(np.flatnonzero(bins == b)[0]) for b in range(bins.max() + 1)]
    assert firsts == sorted(firsts)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25), seq_len=st.integers(2, 24),
       block_tokens=st.integers(3, 17))
def test_every_place_of_a_document_stands_in_one_sample(tmp_path_factory, lengths, seq_len, block_tokens):
    if max(lengths) < 2:
        lengths = [*lengths, 2]
    manifest = write_documents(tmp_path_factory.mktemp("d"), [np.full(n, 5) for n in lengths],
                               block_tokens=block_tokens)
    plan = make_plan(manifest, "train", seq_len)
    seen = np.zeros(sum(lengths), np.int64)
    for sample in range(plan.samples):
        pieces = plan.pieces[int(plan.starts[sample]):int(plan.starts[sample + 1])]
        assert 1 <= int(pieces["places"].sum()) <= seq_len
        for first, places in pieces.tolist():
            seen[first:first + places] += 1
    ends = np.cumsum(lengths) - 1
    expected = np.ones(sum(lengths), np.int64)
    expected[ends] = 0  # the last token of a document has no token of its own after it
    assert seen.tolist() == expected.tolist()
    assert plan.padding == pytest.approx(1 - expected.sum() / (plan.samples * seq_len))


def test_a_plan_is_bound_to_its_dataset_and_bytes(tmp_path):
    manifest = write_documents(tmp_path / "a", [np.full(n, 3) for n in (5, 9, 30)])
    with pytest.raises(UserError, match=r"no packing plan for this length; `pretrain data pack"):
        load_plan(manifest, "train", 8)
    made = make_plan(manifest, "train", 8)
    assert load_plan(manifest, "train", 8).sha256 == made.sha256
    path = plan_path(manifest.folder, "train", 8)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataCorruption, match=r"train\.pack-8\.plan: does not have the bytes"):
        load_plan(manifest, "train", 8)
    make_plan(manifest, "train", 8)
    other = write_documents(tmp_path / "b", [np.full(n, 3) for n in (5, 9, 31)])
    plan_path(other.folder, "train", 8).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="another dataset or length"):
        load_plan(other, "train", 8)
