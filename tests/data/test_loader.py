"""Updates of a rank: the same global batches for every world size, split, worker count and restart."""

import os
import signal
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.run import ResolvedBatch
from pretrain.config.source import OrderConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import UpdateLoader, read_rows
from pretrain.data.mixture import MixtureSource
from pretrain.data.order import GlobalOrder
from pretrain.data.shards import ShardSource
from pretrain.data.synthetic import ArraySource
from pretrain.errors import DataCorruption, PretrainError, UserError

GLOBAL_BATCH, WINDOWS, SEQ_LEN = 24, 50, 4


def counting_source(windows=WINDOWS) -> ArraySource:
    return ArraySource(np.arange(windows * SEQ_LEN + 1), seq_len=SEQ_LEN)


def order_of(source, **order) -> GlobalOrder:
    return GlobalOrder([len(source)], global_batch_size=GLOBAL_BATCH, seed=9, order=OrderConfig(**order))


def split(world: int, accumulation: int) -> ResolvedBatch:
    return ResolvedBatch(global_batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH // world // accumulation,
                         gradient_accumulation_steps=accumulation, data_parallel_size=world)


def global_batches(source, order, world, accumulation, *, start=0, updates=5, workers=0) -> list[dict[str, list]]:
    """The global batches put together again from what every rank gets."""
    batch = split(world, accumulation)
    ranks = []
    for rank in range(world):
        with UpdateLoader(source, order, batch, rank=rank, start_k=start, workers=workers) as loader:
            ranks.append(list(islice(loader, updates)))
    together = []
    for number in range(updates):
        micro = [m for rank in ranks for m in rank[number].micro_batches]
        assert {rank[number].k for rank in ranks} == {start + number}
        assert [len(m) for m in micro] == [batch.micro_batch_size] * (world * accumulation)
        names = micro[0].tensors
        together.append({"sample_ids": torch.cat([m.sample_ids for m in micro]).tolist(),
                         **{name: torch.cat([m[name] for m in micro]).tolist() for name in names}})
    return together


def reference(source, order, start=0, updates=5) -> list[dict[str, list]]:
    """One rank, one micro-batch, one row at a time, straight from the source."""
    found = []
    for k in range(start, start + updates):
        ids = order.positions(k, 0, GLOBAL_BATCH)[1].tolist()
        rows = [source.get(np.array([i])) for i in ids]
        found.append({"sample_ids": [k * GLOBAL_BATCH + j for j in range(GLOBAL_BATCH)], "source_ids": ids,
                      **{name: [row[name][0].tolist() for row in rows] for name in rows[0].tensors}})
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("order", [{}, {"chunk_windows": 3, "group_chunks": 2, "lanes": 4}])
def test_global_batches_do_not_depend_on_ranks_and_splits(world, accumulation, order):
    source = counting_source()
    found = global_batches(source, order_of(source, **order), world, accumulation)
    assert found == reference(source, order_of(source, **order))


@pytest.mark.parametrize("world", [1, 2])
def test_loader_processes_change_nothing(world):
    source = counting_source()
    found = global_batches(source, order_of(source), world, 2, start=3, updates=6, workers=2)
    assert found == reference(source, order_of(source), start=3, updates=6)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(stops=st.lists(st.integers(1, 8), min_size=2, max_size=4), worlds=st.lists(st.sampled_from([1, 2, 4]),
                                                                                min_size=4, max_size=4))
def test_restarts_continue_the_run_on_any_world(stops, worlds):
    """Restarted twice or more, on other worlds, over several epochs (50 windows, 24 a batch)."""
    source = counting_source()
    found, at = [], 0
    for stop, world in zip(stops, worlds, strict=False):
        found += global_batches(source, order_of(source), world, 1, start=at, updates=stop)
        at += stop
    assert found == reference(source, order_of(source), updates=at)


def test_tokens_of_an_epoch_are_each_served_once():
    source = counting_source(windows=48)
    found = global_batches(source, order_of(source), 2, 2, updates=4)
    for epoch in (found[:2], found[2:]):
        tokens = [token for batch in epoch for row in batch["input_ids"] for token in row]
        assert sorted(tokens) == list(range(48 * SEQ_LEN))
        assert all(label == token + 1 for batch in epoch for tokens, labels in
                   zip(batch["input_ids"], batch["labels"], strict=True)
                   for token, label in zip(tokens, labels, strict=True))


def test_rows_of_a_mixture_say_where_they_come_from():
    parts = [counting_source(50), ArraySource(np.arange(10_000, 10_081), seq_len=SEQ_LEN)]
    source = MixtureSource(parts, weights=[2, 1], period=6)
    order = GlobalOrder([50, 20], global_batch_size=GLOBAL_BATCH, seed=1, order=OrderConfig(), weights=[2, 1], period=6)
    batch = read_rows(source, order, 7, 5, 20)
    for row in range(15):
        part, window = int(batch["source_index"][row]), int(batch["source_ids"][row])
        assert batch["input_ids"][row].tolist() == parts[part].get(np.array([window]))["input_ids"][0].tolist()
    assert batch["source_index"].tolist().count(1) == 5


def test_parts_with_other_tensors_are_refused():
    source = MixtureSource([counting_source(), ArraySource(np.arange(90), seq_len=8)], weights=[1, 1], period=2)
    order = GlobalOrder([50, 10], global_batch_size=GLOBAL_BATCH, seed=1, order=OrderConfig(), weights=[1, 1], period=2)
    with pytest.raises(UserError, match=r"data\.source\.parts\.1: .* must give the same tensors"):
        read_rows(source, order, 0, 0, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_creating_and_using_a_loader_draws_no_global_random_number(workers):
    source = counting_source()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    global_batches(source, order_of(source), 1, 1, updates=2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


class BrokenSource(ArraySource):
    """Raises for one window what a damaged shard would."""

    def get(self, sample_ids: np.ndarray) -> Batch:
        if 17 in sample_ids:
            raise DataCorruption("train-000003.tar: SHA-256 is another")
        return super().get(sample_ids)


class DyingSource(ArraySource):
    """Kills the process that reads one window, as the kernel does when memory runs out."""

    def get(self, sample_ids: np.ndarray) -> Batch:
        if 17 in sample_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get(sample_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_corruption_reaches_the_trainer_as_one_line(workers):
    source = BrokenSource(np.arange(WINDOWS * SEQ_LEN + 1), seq_len=SEQ_LEN)
    with UpdateLoader(source, order_of(source), split(1, 1), rank=0, workers=workers) as loader, \
            pytest.raises(DataCorruption) as caught:
        list(islice(loader, 5))
    assert str(caught.value) == "train-000003.tar: SHA-256 is another"


def test_a_killed_loader_process_is_reported_and_leaves_the_trainer_alone():
    source = DyingSource(np.arange(WINDOWS * SEQ_LEN + 1), seq_len=SEQ_LEN)
    handler = signal.getsignal(signal.SIGCHLD)
    with UpdateLoader(source, order_of(source), split(1, 1), rank=0, workers=1, prefetch=8) as loader:
        assert signal.getsignal(signal.SIGCHLD) == handler
        time.sleep(0.5)  # it reads ahead and dies, which must raise nothing here
        with pytest.raises(PretrainError, match="rank 0: a data loader process died before it gave batch"):
            list(islice(loader, 3))  # an epoch


def test_loader_processes_ignore_signals_meant_for_the_trainer():
    source = counting_source()
    with UpdateLoader(source, order_of(source), split(1, 1), rank=0, workers=2, prefetch=1) as loader:
        for process in loader._processes():  # at once: they may be hardly born
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(process.pid, name)
        first = next(loader)
        rest = list(islice(loader, 6))
        processes = loader._processes()
    assert [update.k for update in [first, *rest]] == list(range(7))
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(StopIteration):
        next(loader)


def test_start_reads_only_what_it_yields():
    """Starting far into a run costs the rows of that batch, not those before it."""
    served = []

    class Watched(ArraySource):
        def get(self, sample_ids):
            served.extend(sample_ids.tolist())
            return super().get(sample_ids)

    source = Watched(np.arange(WINDOWS * SEQ_LEN + 1), seq_len=SEQ_LEN)
    with UpdateLoader(source, order_of(source), split(2, 1), rank=1, start_k=10**9) as loader:
        update = next(loader)
    assert update.k == 10**9
    assert len(served) == GLOBAL_BATCH // 2


@pytest.mark.timeout(60)
def test_no_named_shared_memory_is_used(monkeypatch):
    """Memory that never had a name cannot be left behind by a killed job. Loader processes inherit the trap."""
    def trap(*args):
        raise AssertionError("a tensor goes through shared memory that has a name")
    for name in ("_share_fd_cpu_", "_share_filename_cpu_", "_new_using_fd_cpu", "_new_using_filename_cpu"):
        assert hasattr(torch.UntypedStorage, name)
        monkeypatch.setattr(torch.UntypedStorage, name, trap)
    source = counting_source()
    assert global_batches(source, order_of(source), 1, 1, workers=2) == reference(source, order_of(source))


def test_shards_through_loader_processes_equal_shards_read_here(dataset):
    manifest = dataset([7, 30, 300, 2, 111], block_tokens=32, blocks_per_shard=2)
    source = ShardSource(manifest, "train", seq_len=8)
    found = global_batches(source, order_of(source), 1, 2, workers=2)
    assert found == reference(source, order_of(source))
