"""Mixtures by temperature and by curriculum: exact shares, and batches that no split, worker or restart changes."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, OrderConfig
from pretrain.data.curriculum import StagedOrder
from pretrain.data.loader import UpdateLoader
from pretrain.data.mixture import MixtureSource
from pretrain.data.open import open_source
from pretrain.data.order import GlobalOrder
from pretrain.data.synthetic import ArraySource
from pretrain.errors import ConfigError

BATCH, SIZES, PERIOD = 12, [50, 20, 7], 12
STAGES = [(0, [2, 1, 0]), (3, [1, 1, 1]), (4, [0, 0, 1]), (9, [1, 0, 5])]


def staged(stages=STAGES, seed=5, **order):
    return StagedOrder.of(SIZES, stages, global_batch_size=BATCH, seed=seed, order=OrderConfig(**order), period=PERIOD)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(k=st.integers(0, 40), start=st.integers(0, 11), rows=st.integers(1, 12), seed=st.integers(0, 9),
       lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_a_batch_of_a_curriculum_is_that_of_its_stage_alone(k, start, rows, seed, lengths):
    starts = [0, *np.cumsum(lengths).tolist()]
    stages = [(first, weights) for first, (_, weights) in zip(starts, STAGES, strict=True)]
    stop = min(BATCH, start + rows)
    order = staged(stages, seed)
    parts, samples = order.positions(k, start, stop)
    number = max(i for i, first in enumerate(starts) if first <= k)
    assert {p for p in parts.tolist()} <= {i for i, w in enumerate(stages[number][1]) if w}
    # The same stage in a curriculum of other lengths gives the same: only batches since its start count.
    moved = [(first + 100 * (i > 0), weights) for i, (first, weights) in enumerate(stages)]
    others = staged(moved, seed).positions(k + 100 * (number > 0), start, stop)
    assert (parts.tolist(), samples.tolist()) == tuple(a.tolist() for a in others)
    whole = order.positions(k, 0, BATCH)
    assert [parts.tolist(), samples.tolist()] == [a[start:stop].tolist() for a in whole]


def test_the_first_stage_is_the_plain_order_and_others_have_their_own():
    plain = GlobalOrder(SIZES, global_batch_size=BATCH, seed=5, order=OrderConfig(), weights=[2, 1, 0], period=PERIOD)
    order = staged([(0, [2, 1, 0]), (3, [2, 1, 0])])
    for k in range(3):
        assert [a.tolist() for a in order.positions(k, 0, BATCH)] == [a.tolist() for a in plain.positions(k, 0, BATCH)]
    assert order.positions(3, 0, BATCH)[1].tolist() != plain.positions(0, 0, BATCH)[1].tolist()
    assert isinstance(staged([(0, [1, 1, 1])]), GlobalOrder)
    assert order.epochs(3, 0, BATCH).tolist() == plain.epochs(0, 0, BATCH).tolist()


def test_each_stage_holds_its_shares_in_every_period():
    order = staged(lanes=2)
    for k in range(12):
        parts = order.positions(k, 0, BATCH)[0]
        weights = next(w for first, w in reversed(STAGES) if first <= k)
        for part, weight in enumerate(weights):
            assert (parts == part).sum() == BATCH * weight // sum(weights)


def source_of(sizes=SIZES):
    parts = [ArraySource(np.arange(1000 * p, 1000 * p + 4 * size + 1), seq_len=4) for p, size in enumerate(sizes)]
    return MixtureSource(parts, weights=STAGES[0][1], period=PERIOD, stages=STAGES[1:])


@pytest.mark.parametrize("world, accumulation, workers", [(2, 1, 0), (3, 2, 0), (1, 1, 2)])
def test_batches_across_stages_do_not_depend_on_splits_workers_and_restarts(world, accumulation, workers):
    def batches(world, accumulation, start, workers=0):
        split = ResolvedBatch(global_batch_size=BATCH, micro_batch_size=BATCH // world // accumulation,
                              gradient_accumulation_steps=accumulation, data_parallel_size=world)
        ranks = []
        for rank in range(world):
            with UpdateLoader(source_of(), staged(), split, rank=rank, start_k=start, workers=workers) as loader:
                ranks.append(list(islice(loader, 12 - start)))
        return [torch.cat([m["input_ids"] for rank in ranks for m in rank[k].micro_batches]).tolist()
                for k in range(12 - start)]
    expected = batches(1, 1, 0)
    for start in (0, 3, 5):
        assert batches(world, accumulation, start, workers) == expected[start:]


def config_of(**changes):
    parts = [{"source": {"kind": "synthetic", "samples": samples}} for samples in (100, 400)]
    return DataConfig.model_validate({"source": {"kind": "mixture", "parts": parts} | changes})


@pytest.mark.parametrize("temperature, share", [(1.0, 4.0), (0.5, 2.0), (0.0, 1.0), (2.0, 16.0)])
def test_shares_follow_the_numbers_to_the_power_of_the_temperature(temperature, share):
    config = config_of(temperature=temperature)
    source = open_source(config.source, config)
    assert source.weights[1] / source.weights[0] == pytest.approx(share)
    assert source.fingerprint != open_source(config_of(temperature=3).source, config).fingerprint


def test_temperature_works_on_given_weights_and_a_curriculum_too():
    weighted = [{"weight": w, "source": {"kind": "synthetic"}} for w in (1, 9)]
    config = config_of(parts=weighted, temperature=0.5)
    assert open_source(config.source, config).weights == [1, 3]
    staged_config = config_of(curriculum=[{"steps": 5, "weights": [1, 0]}, {"steps": 2, "weights": [1, 4]},
                                          {"weights": [0, 1]}], temperature=0.5)
    source = open_source(staged_config.source, staged_config)
    assert source.weights == [1, 0]
    assert source.stages == [(5, [1, 2]), (7, [0, 1])]


@pytest.mark.parametrize("changes, message", [
    ({"curriculum": [{"weights": [1]}]}, r"curriculum\.0\.weights: .*each of the 2 parts"),
    ({"curriculum": [{"weights": [0, 0]}]}, "not all 0"), ({"curriculum": [{"weights": [1, -1]}]}, "0 or more"),
    ({"curriculum": [{"weights": [1, 1], "steps": 3}]}, r"curriculum\.0\.steps: the last stage goes to the end"),
    ({"curriculum": [{"weights": [1, 1]}, {"weights": [1, 1]}]}, "say how many batches"),
    ({"parts": [{"weight": 1, "source": {"kind": "synthetic"}}, {"source": {"kind": "synthetic"}}]},
     r"parts\.1\.weight: give every part a weight"),
    ({"parts": [{"weight": 1, "source": {"kind": "synthetic"}}], "curriculum": [{"weights": [1]}]},
     "the curriculum states the shares")])
def test_mixtures_that_say_too_little_or_too_much_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_a_weight_without_a_place_is_refused_unless_it_is_nothing():
    with pytest.raises(ConfigError, match="less than a place"):
        staged([(0, [1, 1e-6, 0])])
    assert set(staged([(0, [1, 0, 0])]).positions(0, 0, BATCH)[0].tolist()) == {0}
