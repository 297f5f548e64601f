"""Packed samples: whole documents with their own labels, the same batches however they are served."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import make_plan
from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, OrderConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.open import open_source
from pretrain.data.order import GlobalOrder
from pretrain.data.packed import PackedSource
from pretrain.errors import UserError

LENGTHS = [3, 17, 1, 9, 40, 2, 5, 5, 12, 30, 4, 8, 21, 6]


def source_of(manifest, seq_len=16, **data) -> PackedSource:
    make_plan(manifest, "train", seq_len)
    return reopened(manifest, seq_len, **data)


def reopened(manifest, seq_len=16, **data) -> PackedSource:
    config = DataConfig.model_validate({"seq_len": seq_len, "source": {
        "kind": "shards", "path": str(manifest.folder), "packing": "best_fit"}} | data)
    return open_source(config.source, config)


@pytest.mark.parametrize("seq_len", [4, 16, 64])
def test_every_next_token_of_every_document_is_learnt_once(dataset, seq_len):
    manifest = dataset(LENGTHS, block_tokens=7, blocks_per_shard=3)
    source = source_of(manifest, seq_len)
    batch = source.get(np.arange(len(source)))
    labels, inputs = batch["labels"].numpy(), batch["input_ids"].numpy()
    learnt = labels != -100
    assert (labels[learnt] == inputs[learnt] + 1).all()  # tokens count 0, 1, 2, ...
    ends = np.cumsum(LENGTHS)
    expected = set(range(int(ends[-1]))) - set((ends - LENGTHS).tolist())
    assert sorted(labels[learnt].tolist()) == sorted(expected)
    assert (inputs[~learnt] == manifest.eos_id).all()
    assert 1 - learnt.mean() == pytest.approx(source.plan.padding)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for row in range(len(inputs)):
        numbers = batch["document_ids"][row].numpy()
        assert (np.diff(numbers) >= 0).all() and numbers[0] == 0
        for number in np.unique(numbers[learnt[row]]):
            assert len(set(owner[inputs[row][(numbers == number) & learnt[row]]].tolist())) == 1
        assert not set(numbers[~learnt[row]].tolist()) & set(numbers[learnt[row]].tolist())


@settings(deadline=None, derandomize=True, max_examples=12)
@given(world=st.sampled_from([1, 2, 4]), start=st.integers(0, 6), seed=st.integers(0, 3))
def test_batches_do_not_depend_on_ranks_and_restarts(tmp_path_factory, world, start, seed):
    from small_datasets import counting_documents, write_dataset
    manifest = write_dataset(tmp_path_factory.mktemp("p") / "d", {"train": counting_documents(LENGTHS)},
                             block_tokens=7, blocks_per_shard=2)
    source = source_of(manifest)
    order = GlobalOrder([len(source)], global_batch_size=4, seed=seed, order=OrderConfig())

    def batches(world, start):
        split = ResolvedBatch(global_batch_size=4, micro_batch_size=1, gradient_accumulation_steps=4 // world,
                              data_parallel_size=world)
        ranks = []
        for rank in range(world):
            with UpdateLoader(source, order, split, rank=rank, start_k=start) as loader:
                ranks.append(list(islice(loader, 8 - start)))
        return [torch.cat([m["labels"] for rank in ranks for m in rank[k].micro_batches]).tolist()
                for k in range(8 - start)]
    assert batches(world, start) == batches(1, 0)[start:]


def test_the_plan_is_part_of_what_a_run_trains_on(dataset):
    manifest = dataset(LENGTHS)
    first = source_of(manifest)
    assert first.fingerprint == reopened(manifest).fingerprint != source_of(manifest, 8).fingerprint
    assert len(first.provenance(0)) == int(first.plan.starts[1])
    with pytest.raises(UserError, match="pretrain data pack"):
        reopened(manifest, 32)
    with pytest.raises(UserError, match=r"data\.source\.packing: .*leave data\.stride out"):
        reopened(manifest, 16, stride=4)
    with pytest.raises(IndexError):
        first.get(np.array([len(first)]))
