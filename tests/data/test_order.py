"""The global order: its formula, every window once an epoch, exact proportions, and no dependence on who asks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.data.order as order_module
from pretrain.config.source import OrderConfig
from pretrain.data.bijection import as_keys, derive, permute, stream_key
from pretrain.data.order import GlobalOrder, quota_table
from pretrain.errors import ConfigError

SEED = 5


def one_source(size, *, batch, seed=SEED, **order) -> GlobalOrder:
    return GlobalOrder([size], global_batch_size=batch, seed=seed, order=OrderConfig(**order))


def stream(order: GlobalOrder, batches: int, start: int = 0) -> np.ndarray:
    return np.concatenate([order.positions(k, 0, order.global_batch_size)[1] for k in range(start, start + batches)])


def by_formula(k, j, *, sizes, batch, config, weights, period, seed):
    """One row of one batch, step by step in Python numbers, as the module's docstring writes it."""
    def key(stream_name, s, *path):
        keys = as_keys(stream_key(stream_name, seed, s))
        for number in path:
            keys = derive(keys, np.array([number], np.uint64))
        return keys

    def bijection(x, n, keys):
        return int(permute(np.array([x], np.uint64), n, keys)[0])

    lanes, chunk = config.lanes, config.chunk_windows if config.shuffle else 1
    b = batch // lanes
    lane, i = j // b, k * b + j % b
    table = quota_table(weights, period).tolist()
    begin = lane * period // lanes
    moved = i + begin
    s = table[moved % period]
    o = moved // period * table.count(s) + table[:moved % period].count(s) - table[:begin].count(s)
    size = sizes[s]
    n = size // chunk
    c = n // lanes
    e, q = divmod(o, c * chunk)
    if not config.shuffle:
        return s, lane * c * chunk + q
    group = min(config.group_chunks or c, c)
    g = q // (group * chunk)
    m = min(group, c - g * group)
    r = q - g * group * chunk
    if chunk > 1:
        r = bijection(r, m * chunk, key("order/groups", s, e, lane, g))
    image = bijection(lane * c + g * group + r // chunk, n, key("order/chunks", s, e))
    phase = int(key("order/phase", s, e)[0]) % size if size % chunk else 0
    return s, (phase + image * chunk + r % chunk) % size


ORDERS = st.builds(OrderConfig, chunk_windows=st.integers(1, 6), group_chunks=st.none() | st.integers(1, 5),
                   lanes=st.integers(1, 4), shuffle=st.booleans())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(config=ORDERS, lane_rows=st.integers(1, 5), sizes=st.lists(st.integers(24, 90), min_size=1, max_size=3),
       k=st.integers(0, 60), data=st.data())
def test_rows_follow_the_formula(config, lane_rows, sizes, k, data):
    batch = config.lanes * lane_rows
    weights = [data.draw(st.integers(1, 5)) for _ in sizes]
    period = 1 if len(sizes) == 1 else 24
    order = GlobalOrder(sizes, global_batch_size=batch, seed=SEED, order=config, weights=weights, period=period)
    sources, samples = order.positions(k, 0, batch)
    expected = [by_formula(k, j, sizes=sizes, batch=batch, config=config, weights=weights, period=period, seed=SEED)
                for j in range(batch)]
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == expected


@settings(deadline=None, derandomize=True, max_examples=60)
@given(size=st.integers(24, 400), config=ORDERS, lane_rows=st.integers(1, 7), epochs=st.integers(1, 3))
def test_every_window_once_an_epoch_up_to_the_stated_loss(size, config, lane_rows, epochs):
    order = one_source(size, batch=config.lanes * lane_rows, **config.model_dump())
    per_lane = order.epoch_samples // config.lanes
    batches = -(-per_lane * epochs // lane_rows)
    lanes = stream(order, batches).reshape(batches, config.lanes, lane_rows).swapaxes(0, 1).reshape(config.lanes, -1)
    for epoch in range(epochs):
        seen = lanes[:, epoch * per_lane:(epoch + 1) * per_lane].ravel()
        assert len(np.unique(seen)) == len(seen) == order.epoch_samples
        assert seen.min() >= 0 and seen.max() < size
        chunk = config.chunk_windows if config.shuffle else 1
        assert size - order.epoch_samples <= config.lanes * chunk - 1


def test_default_order_loses_nothing_and_epochs_differ():
    order = one_source(1000, batch=8)
    assert order.epoch_samples == 1000
    first, second = stream(order, 125), stream(order, 125, start=125)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first == second).sum() < 10
    assert (first == stream(one_source(1000, batch=8, seed=SEED + 1), 125)).sum() < 10


def test_windows_left_out_differ_from_epoch_to_epoch():
    """The windows past the last whole chunk must be seen too: over 40 epochs none of 47 is always left out."""
    order = one_source(47, batch=2, chunk_windows=10, lanes=2)
    assert order.epoch_samples == 40
    seen = Counter(stream(order, 40 * 40 // 2).tolist())
    assert len(seen) == 47
    assert min(seen.values()) > 20


def test_written_order():
    assert stream(one_source(10, batch=4, shuffle=False), 5).tolist() == [*range(10), *range(10)]
    lanes = stream(one_source(10, batch=4, lanes=2, shuffle=False), 2).reshape(2, 2, 2)
    assert lanes.tolist() == [[[0, 1], [5, 6]], [[2, 3], [7, 8]]]


def test_chunks_are_read_together():
    """With one chunk a group, the windows of a chunk follow each other in a lane."""
    places = stream(one_source(400, batch=8, chunk_windows=8, group_chunks=1), 50).reshape(50, 8)
    assert all(sorted(row - row.min()) == list(range(8)) and row.min() % 8 == 0 for row in places)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(config=ORDERS, k=st.integers(0, 10**12), data=st.data())
def test_a_row_does_not_depend_on_the_slice_it_is_asked_in(config, k, data):
    def order():
        return GlobalOrder([300, 70], global_batch_size=12, seed=SEED, order=config, weights=[3, 1], period=8)
    config = config.model_copy(update={"lanes": data.draw(st.sampled_from([1, 2, 3, 4]))})
    whole = order().positions(k, 0, 12)
    cuts = sorted({0, 12, *data.draw(st.lists(st.integers(0, 12), max_size=3))})
    for part in range(2):
        pieces = [order().positions(k, a, b)[part] for a, b in itertools.pairwise(cuts)]
        assert np.concatenate(pieces).tolist() == whole[part].tolist()


def test_asking_back_and_forth_gives_the_same_batches():
    order = one_source(5000, batch=4)
    asked = [0, 3000, 1, 10**9, 2999, 0]
    assert [order.positions(k, 0, 4)[1].tolist() for k in asked] == \
        [one_source(5000, batch=4).positions(k, 0, 4)[1].tolist() for k in asked]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5), period=st.integers(500, 1000))
def test_quota_table_is_exact_and_interleaved(weights, period):
    table = quota_table(weights, period)
    counts = np.bincount(table, minlength=len(weights))
    share = np.array(weights) / sum(weights)
    assert counts.sum() == period
    assert (np.abs(counts - share * period) < 1).all()
    for s, count in enumerate(counts):
        # In any prefix a source is ahead or behind its share by less than the number of sources.
        ahead = np.cumsum(table == s) - np.arange(1, period + 1) * count / period
        assert np.abs(ahead).max() < len(weights)


def test_mixture_proportions_hold_in_every_period_of_every_lane():
    order = GlobalOrder([50, 30, 40], global_batch_size=8, seed=SEED, order=OrderConfig(lanes=4), weights=[5, 3, 2],
                        period=10)
    sources = np.concatenate([order.positions(k, 0, 8)[0] for k in range(100)])
    lanes = sources.reshape(100, 4, 2).swapaxes(0, 1).reshape(4, -1)
    for at in range(150):
        for lane in lanes:
            assert np.bincount(lane[at:at + 10], minlength=3).tolist() == [5, 3, 2]
    # Lanes read the table from different places, so that a batch holds several sources.
    assert all(len(set(batch)) > 1 for batch in sources.reshape(100, 8))


def test_parts_of_a_mixture_go_through_their_epochs():
    order = GlobalOrder([50, 30], global_batch_size=10, seed=SEED, order=OrderConfig(), weights=[1, 1], period=2)
    parts, samples = (np.concatenate(column) for column in zip(*(order.positions(k, 0, 10) for k in range(60)),
                                                              strict=True))
    for part, size in ((0, 50), (1, 30)):
        served = samples[parts == part]
        for at in range(0, len(served) - size + 1, size):
            assert sorted(served[at:at + size]) == list(range(size))


def test_sources_without_end_are_numbered():
    order = one_source(None, batch=6)
    assert order.epoch_samples is None
    assert stream(order, 4).tolist() == list(range(24))
    lanes = GlobalOrder([None, None], global_batch_size=6, seed=SEED, order=OrderConfig(lanes=3), weights=[2, 1],
                        period=6)
    served = Counter((s, i) for k in range(50) for s, i in zip(*(x.tolist() for x in lanes.positions(k, 0, 6)),
                                                              strict=True))
    assert max(served.values()) == 1


def test_cost_does_not_grow_with_the_position(monkeypatch):
    """The numbers of bijections and of elements in them are those of the first batch, wherever we start."""
    def work(k):
        calls = []
        monkeypatch.setattr(order_module, "permute", lambda x, n, keys: calls.append(len(x)) or permute(x, n, keys))
        order = one_source(10**9, batch=64, chunk_windows=8, group_chunks=1000, lanes=4)
        for batch in range(k, k + 20):
            order.positions(batch, 16, 32)
        return calls
    assert work(0) == work(10**6) == work(10**12)
    assert sum(work(10**12)) <= 2 * 2 * order_module.CACHE_POSITIONS


@pytest.mark.parametrize(("size", "batch", "order", "key"), [
    (100, 6, {"lanes": 4}, "data.order.lanes"),
    (100, 8, {"lanes": 8, "chunk_windows": 16}, "data.order"),
    (0, 8, {}, "data.order"),
])
def test_impossible_orders_are_refused(size, batch, order, key):
    with pytest.raises(ConfigError) as caught:
        one_source(size, batch=batch, **order)
    assert caught.value.key == key


def test_a_part_too_small_for_the_period_is_refused_with_a_cure():
    with pytest.raises(ConfigError, match=r"raise data\.source\.period to 1001"):
        quota_table([999, 1], 100)


@pytest.mark.parametrize(("sizes", "lanes", "chunk", "weights", "period"), [
    ([17], 1, 1, [1.0], 1), ([40], 4, 1, [1.0], 1), ([41], 2, 3, [1.0], 1), ([17, 9], 1, 1, [2.0, 1.0], 3),
    ([24, None], 2, 2, [1.0, 1.0], 2)])
def test_epochs_count_how_often_a_sample_was_served_before(sizes, lanes, chunk, weights, period):
    """Exactly where an epoch leaves nothing out, else at least as often."""
    order = GlobalOrder(sizes, global_batch_size=4, seed=3, order=OrderConfig(lanes=lanes, chunk_windows=chunk),
                        weights=weights, period=period)
    seen, exact = Counter(), all(size is None or size % (lanes * chunk) == 0 for size in sizes)
    lane_rows = 4 // lanes
    for k in range(60):
        epochs = order.epochs(k, 0, 4)
        assert np.array_equal(np.concatenate([order.epochs(k, 0, 3), order.epochs(k, 3, 4)]), epochs)
        for row, (source, sample, epoch) in enumerate(zip(*(x.tolist() for x in (*order.positions(k, 0, 4), epochs)),
                                                          strict=True)):
            if sizes[source] is None:
                assert epoch == 0
            elif len(sizes) == 1:
                share = sizes[0] // chunk // lanes * chunk  # places of a lane in an epoch
                assert epoch == (k * lane_rows + row % lane_rows) // share
                assert not exact or epoch == seen[source, sample]
            else:
                assert not exact or lanes > 1 or epoch == seen[source, sample]
            seen[source, sample] += 1
