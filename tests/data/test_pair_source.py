"""Pairs as samples: against a naive reading, the same global batches however they are served, draws by seed and id."""

from itertools import islice

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest, PairsRecord, write_manifest
from data_prep.pairs import PairWriter, TokenPair
from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, OrderConfig
from pretrain.data.loader import UpdateLoader, read_rows
from pretrain.data.mixture import MixtureSource
from pretrain.data.open import eval_batches, open_source
from pretrain.data.order import GlobalOrder
from pretrain.data.pairs import PairSource, trim
from pretrain.errors import DataCorruption, UserError

N, BATCH, PREFIX, SUFFIX, PAD = 37, 12, [101], [102, 103], 9


@pytest.fixture(scope="module")
def pairs() -> list[TokenPair]:
    draw = np.random.default_rng(0)
    def text():
        return draw.integers(200, 900, draw.integers(1, 14))
    return [TokenPair(text(), text(), [text() for _ in range(i % 5)], 2**63 + i // 2, i,
                      [1000 * i + j for j in range(i % 5)], [None] * (i % 5), {"pair": i}) for i in range(N)]


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with PairWriter(folder, "train", dtype=np.dtype("<u2"), block_pairs=4, blocks_per_shard=3) as writer:
        for pair in pairs:
            writer.push(pair, 1)
    write_manifest(folder, Manifest(
        tokenizer_sha256=None, dtype="<u2", kind="pairs", block_tokens=0, eos_id=0, vocab_size=1000, provenance={},
        pairs=PairsRecord(block_pairs=4, prefix_ids=PREFIX, suffix_ids=SUFFIX, pad_id=PAD),
        splits={"train": writer.record}))
    return folder


def open_pairs(folder, **changes) -> PairSource:
    stated = {"kind": "pairs", "path": str(folder), "query_length": 7, "passage_length": 12, "negatives_per_query": 2}
    data = DataConfig.model_validate({"source": stated | changes})
    source = open_source(data.source, data)
    assert isinstance(source, PairSource)
    return source


def row_of(text, length, width):
    """Slow reference of a padded row and its mask."""
    ids = [*PREFIX, *text[:length - len(PREFIX) - len(SUFFIX)].tolist(), *SUFFIX]
    return ids + [PAD] * (width - len(ids)), [True] * len(ids) + [False] * (width - len(ids))


def test_samples_equal_a_naive_reading(folder, pairs):
    wanted = np.array([36, 0, 4, 4, 13, 9])
    found = open_pairs(folder).get(wanted)
    assert found.sample_ids.tolist() == wanted.tolist()
    for row, i in enumerate(wanted.tolist()):
        pair = pairs[i]
        for side, text, length, width in (("query", pair.query, 7, 8), ("positive", pair.positive, 12, 16)):
            ids, mask = row_of(text, length, width)
            assert found[f"{side}_input_ids"][row].tolist() == ids
            assert found[f"{side}_attention_mask"][row].tolist() == mask
        assert np.uint64(found["query_ids"][row].numpy().view(np.uint64)) == pair.query_id
        assert int(found["passage_ids"][row]) == pair.positive_id
        drawn = found["negative_ids"][row][found["negative_mask"][row]].tolist()
        assert len(drawn) == len(set(drawn)) == min(2, len(pair.negatives))
        for column, number in enumerate(drawn):
            ids, mask = row_of(pair.negatives[pair.negative_ids.index(number)], 12, 16)
            assert found["negative_input_ids"][row, column].tolist() == ids
            assert found["negative_attention_mask"][row, column].tolist() == mask
        assert not found["negative_attention_mask"][row][~found["negative_mask"][row]].any()


def test_negatives_depend_on_seed_and_sample_id_alone(folder):
    everything = np.arange(N)
    at_once = open_pairs(folder).get(everything)["negative_ids"]
    source = open_pairs(folder)
    one_by_one = [source.get(np.array([i]))["negative_ids"][0] for i in everything[::-1]][::-1]
    assert torch.equal(at_once, torch.stack(one_by_one))
    draws = torch.stack([open_pairs(folder, seed=seed).get(everything)["negative_ids"] for seed in range(40)])
    assert set(draws[:, 4, 0].tolist()) == {4000, 4001, 4002, 4003}
    assert len({tuple(draws[seed].flatten().tolist()) for seed in range(40)}) == 40
    # Pairs with the same number of negatives do not all draw the same places.
    assert len({tuple(row) for row in (at_once[4::5] % 1000).tolist()}) > 1


def test_every_epoch_draws_other_negatives_and_only_these_change(folder):
    source = open_pairs(folder)
    everything = np.arange(N)
    epochs = [source.get_in_epoch(everything, np.full(N, epoch)).tensors for epoch in range(30)]
    assert torch.equal(epochs[0]["negative_ids"], source.get(everything)["negative_ids"])
    assert len({tuple(epoch["negative_ids"].flatten().tolist()) for epoch in epochs}) == 30
    assert {int(epoch["negative_ids"][4, 0]) for epoch in epochs} == {4000, 4001, 4002, 4003}
    for epoch in epochs[1:]:
        assert all(torch.equal(epoch[name], epochs[0][name]) for name in epoch if not name.startswith("negative_"))
    rows, at = [0, 4, 9, 14, 4], [3, 0, 7, 7, 12]
    mixed = source.get_in_epoch(np.array(rows), np.array(at))["negative_ids"]
    assert mixed.tolist() == [epochs[e]["negative_ids"][r].tolist() for r, e in zip(rows, at, strict=True)]


def test_the_loader_serves_each_pair_as_it_is_in_its_epoch(folder):
    source = open_pairs(folder)
    served = batches_of(source, 2)
    ids, negatives = (torch.cat([batch[name] for batch in served]) for name in ("source_ids", "negative_ids"))
    for position, (sample, found) in enumerate(zip(ids.tolist(), negatives, strict=True)):
        want = source.get_in_epoch(np.array([sample]), np.array([position // N]))["negative_ids"][0]
        assert torch.equal(found, want)
    mixture = MixtureSource([source, open_pairs(folder, seed=1)], weights=[1, 1], period=2)
    order = GlobalOrder([N, N], global_batch_size=BATCH, seed=5, order=OrderConfig(), weights=[1, 1], period=2)
    times: dict[tuple[int, int], int] = {}
    for k in range(10):
        batch = read_rows(mixture, order, k, 0, BATCH)
        for part, sample, found in zip(batch["source_index"].tolist(), batch["source_ids"].tolist(),
                                       batch["negative_ids"], strict=True):
            epoch = times.get((part, sample), 0)
            times[part, sample] = epoch + 1
            want = mixture.parts[part].get_in_epoch(np.array([sample]), np.array([epoch]))["negative_ids"][0]
            assert torch.equal(found, want)


def batches_of(source, world, *, start=0, workers=0):
    order = GlobalOrder([N], global_batch_size=BATCH, seed=5, order=OrderConfig())
    split = ResolvedBatch(global_batch_size=BATCH, micro_batch_size=3, gradient_accumulation_steps=BATCH // world // 3,
                          data_parallel_size=world)
    ranks = []
    for rank in range(world):
        with UpdateLoader(source, order, split, rank=rank, start_k=start, workers=workers) as loader:
            ranks.append(list(islice(loader, 7 - start)))
    micro = [[m for rank in ranks for m in rank[k].micro_batches] for k in range(7 - start)]
    return [{name: torch.cat([m[name] for m in batch]) for name in batch[0].tensors} for batch in micro]


def same(found, expected):
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(found, expected, strict=True))


def test_global_batches_are_the_same_at_any_world_and_after_restarts(folder):
    expected = batches_of(open_pairs(folder), 1)
    for world in (2, 4):
        assert same(batches_of(open_pairs(folder), world), expected)
        assert same(batches_of(open_pairs(folder), world, start=4), expected[4:])
    assert same(batches_of(open_pairs(folder), 1, start=5, workers=1), expected[5:])
    assert sorted(torch.cat([b["source_ids"] for b in expected])[:N].tolist()) == list(range(N))


def test_mixtures_and_evaluation_take_pairs(folder):
    source = open_pairs(folder)
    mixture = MixtureSource([source, open_pairs(folder, seed=1)], weights=[1, 1], period=2)
    packed = np.array([3, (1 << 48) | 8, 4])
    found = mixture.get(packed)
    assert torch.equal(found["query_input_ids"], source.get(np.array([3, 8, 4]))["query_input_ids"])
    served = [list(eval_batches(source, rank=rank, world=2, batch_size=5)) for rank in range(2)]
    ids = torch.cat([b.sample_ids for rank in served for b in rank])
    assert sorted(ids[ids >= 0].tolist()) == list(range(N))
    assert [len(rank) for rank in served] == [4, 4]
    assert int((ids == -1).sum()) == 3


def test_trim_takes_off_common_padding_only(folder):
    batch = open_pairs(folder, passage_length=64).get(np.arange(10))
    for side in ("positive", "negative"):
        ids, mask = trim(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"])
        assert ids.shape == mask.shape
        assert ids.shape[-1] == 24 or ids.shape[-1] == 16
        assert int(mask.sum()) == int(batch[f"{side}_attention_mask"].sum())
        assert not batch[f"{side}_attention_mask"][..., ids.shape[-1]:].any()
        assert mask[..., -8:].any()


def test_what_decides_a_sample_is_in_the_fingerprint(folder):
    first = open_pairs(folder).fingerprint
    assert open_pairs(folder, verify="off").fingerprint == first
    for changes in ({"query_length": 8}, {"passage_length": 13}, {"negatives_per_query": 1}, {"seed": 1}):
        assert open_pairs(folder, **changes).fingerprint != first


def test_faults_are_named(folder, tmp_path):
    import shutil
    with pytest.raises(UserError, match="puts 3 tokens around each text; query_length 3"):
        open_pairs(folder, query_length=3)
    with pytest.raises(UserError, match="holds pairs, not documents"):
        open_source(*_as_shards(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    tar = copy / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:600] + b"?" + tar.read_bytes()[601:])
    with pytest.raises(DataCorruption, match=r"train-000001\.tar: SHA-256"):
        open_pairs(copy)
    source = open_pairs(copy, verify="touch")
    assert len(source.get(np.array([0, 11, 24])))
    with pytest.raises(DataCorruption, match=r"train-000001\.tar"):
        source.get(np.array([12]))


def _as_shards(folder):
    data = DataConfig.model_validate({"source": {"kind": "shards", "path": str(folder)}, "seq_len": 2})
    return data.source, data


def test_data_at_shows_the_pair_of_a_row(folder, pairs):
    from pretrain.cli.data_at import _sample
    from pretrain.data.open import TrainingData
    source = open_pairs(folder)
    order = GlobalOrder([N], global_batch_size=BATCH, seed=5, order=OrderConfig())
    shown = _sample(TrainingData(source, order, "", order.epoch_samples), 1, 3, {})
    pair = pairs[shown["window"]]
    assert shown["documents"] == [{"pair": shown["window"]}]
    texts = [row_of(pair.query, 7, 0)[0], row_of(pair.positive, 12, 0)[0]]
    assert shown["text"].split() == [str(i) for text in texts for i in text]
