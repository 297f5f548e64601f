"""The loader: CPU a window beside stock webdataset, time to the first batch at any position, cost of the order.

The first batch is timed on a dataset of 16 shards and on a manifest of a million, whose rows name the same 16 files
over and over: at the start, at half an epoch, and far on.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks.harness import Comparison, Summary, compare, cpu_seconds, rounds, wall_seconds, write_results
from data_prep.manifest import Manifest, SplitRecord, write_manifest, write_table
from data_prep.shards import ShardWriter
from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, OrderConfig, ShardsConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.order import GlobalOrder
from pretrain.data.shards import ShardSource, open_shards

SEQ_LEN, WINDOWS, BATCH = 512, 8192, 64
POSITIONS = (0, 1_000, 1_000_000, 1_000_000_000)
MANY_SHARDS = 1_000_000
GOAL = 10.0


def write_shards(folder: Path, tokens: int = WINDOWS * SEQ_LEN + 1, blocks_per_shard: int = 16) -> Manifest:
    """Documents of exponential length, 1,000 tokens on average, as a prepared dataset."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    left = tokens
    with ShardWriter(folder, "train", dtype=np.dtype("<u2"), blocks_per_shard=blocks_per_shard) as writer:
        for number in itertools.count():
            document = draw.integers(1, 50_000, min(left, 2 + int(draw.exponential(1000))))
            document[-1] = 0
            writer.push(document, utf8_bytes=4 * len(document), source=0, doc_hash=number, provenance={"n": number})
            left -= len(document)
            if left == 0:
                break
    assert writer.record is not None
    return write_manifest(folder, Manifest(
        tokenizer_sha256=None, dtype="<u2", block_tokens=16384, eos_id=0, vocab_size=50_000,
        splits={"train": writer.record}, provenance={}))


def pretend_many(folder: Path, real: Manifest) -> Manifest:
    """A dataset of a million shards of equal size: rows that name the whole shards of `real` in turn."""
    folder.mkdir()
    table = real.split("train").table[:-1]  # the last one is shorter
    for file in real.folder.glob("train-*"):
        os.link(file, folder / file.name)
    many = np.resize(np.asarray(table), MANY_SHARDS)
    each = int(table["tokens"][0])
    many["first_token"] = np.arange(MANY_SHARDS, dtype=np.uint64) * np.uint64(each)
    name, digest = write_table(folder, "train", many)
    record = SplitRecord(tokens=each * MANY_SHARDS, docs=MANY_SHARDS, bytes=each * MANY_SHARDS, table=name,
                         table_sha256=digest)
    return write_manifest(folder, real.model_copy(update={"splits": {"train": record}}))


def write_samples(path: Path, source: ShardSource) -> None:
    """The same windows as one tar with one sample a sequence: 513 tokens, the usual layout for webdataset."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for window in range(len(source)):
            batch = source.get(np.array([window]))
            tokens = np.append(batch["input_ids"][0].numpy(), batch["labels"][0, -1].numpy()).astype("<u2")
            content = io.BytesIO()
            np.save(content, tokens)
            info = tarfile.TarInfo(f"{window:08d}.tokens.npy")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)


def whole_batch() -> ResolvedBatch:
    """One rank, one micro-batch."""
    return ResolvedBatch(global_batch_size=BATCH, micro_batch_size=BATCH, gradient_accumulation_steps=1,
                         data_parallel_size=1)


def loader_of(source: ShardSource, start_k: int = 0, workers: int = 0) -> UpdateLoader:
    """A loader in the default order."""
    order = GlobalOrder([len(source)], global_batch_size=BATCH, seed=0, order=OrderConfig())
    return UpdateLoader(source, order, whole_batch(), rank=0, start_k=start_k, workers=workers)


def read_ours(source: ShardSource, workers: int = 0) -> int:
    """One epoch in shuffled order: input_ids, labels with document masking, document ids."""
    with loader_of(source, workers=workers) as loader:
        updates = itertools.islice(loader, len(source) // BATCH)
        return sum(len(micro) for update in updates for micro in update.micro_batches)


def read_stock(path: Path) -> int:
    """One epoch through a shuffle buffer: input_ids and labels, no document ids (one sample knows of none)."""
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(1000).decode().to_tuple("tokens.npy")
    found = 0
    for (tokens,) in pipeline.batched(BATCH):
        windows = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        input_ids, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        found += len(input_ids) and len(labels)
    return found


def throughput(source: ShardSource, samples: Path) -> Comparison:
    """Windows per CPU-second of this process, ours over stock."""
    def ours() -> float:
        return WINDOWS / cpu_seconds(lambda: _expect(read_ours(source)))

    def stock() -> float:
        return WINDOWS / cpu_seconds(lambda: _expect(read_stock(samples)))
    return compare(ours, stock, unit="windows/CPU-s")


def _expect(windows: int) -> None:
    if windows != WINDOWS:
        raise RuntimeError(f"{windows} windows read, {WINDOWS} expected")


def first_batch(folder: Path, epoch_windows: int) -> dict[str, Summary]:
    """Milliseconds from nothing open to the batch at a position, all checks of `verify: touch` included: it hashes
    the shards that the batch touches, of many shards one a window.
    """
    config = ShardsConfig(path=str(folder), verify="touch")

    def open_at(k: int) -> None:
        source = open_shards(config, DataConfig(seq_len=SEQ_LEN, source=config))
        with loader_of(source, start_k=k) as loader:
            assert next(loader).k == k

    def milliseconds(k: int) -> float:
        return 1e3 * wall_seconds(lambda: open_at(k))
    places = {f"batch {k}": k for k in POSITIONS} | {"half an epoch": epoch_windows // BATCH // 2}
    return rounds({name: functools.partial(milliseconds, k) for name, k in places.items()}, unit="ms")


def order_cost() -> dict[str, Summary]:
    """Microseconds of CPU a window for the order alone, batch by batch, on a source of ten million windows."""
    def walk(order: OrderConfig, sizes: list[int], weights: list[float], period: int) -> float:
        whole = GlobalOrder(sizes, global_batch_size=BATCH, seed=0, order=order, weights=weights, period=period)
        batches = 2048
        return 1e6 * cpu_seconds(lambda: [whole.positions(k, 0, BATCH) for k in range(batches)]) / batches / BATCH
    plain, lanes = OrderConfig(), OrderConfig(chunk_windows=64, group_chunks=100, lanes=64)
    return rounds({
        "default": lambda: walk(plain, [10**7], [1.0], 1),
        "64 lanes, groups of 100 chunks of 64": lambda: walk(lanes, [10**7], [1.0], 1),
        "mixture of three": lambda: walk(plain, [10**7, 10**6, 10**6], [5.0, 3.0, 2.0], 1000)}, unit="us/window")


def main() -> None:
    """Run it all in a temporary folder; under a minute."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = ShardSource(write_shards(Path(folder) / "shards"), "train", seq_len=SEQ_LEN)
        samples = Path(folder) / "samples.tar"
        write_samples(samples, source)
        speed = throughput(source, samples)
        with_process = rounds({"1 loader process": lambda: 1e6 * cpu_seconds(lambda: read_ours(source, 1)) / WINDOWS},
                              unit="us/window")
        starts = first_batch(Path(folder) / "shards", WINDOWS)
        many = pretend_many(Path(folder) / "many", source.manifest)
        starts_of_many = first_batch(Path(folder) / "many", many.splits["train"].tokens // SEQ_LEN)
        costs = order_cost()
    flatness, flatness_of_many = (
        max(start.median for start in found.values()) / min(start.median for start in found.values())
        for found in (starts, starts_of_many))
    print(f"ours   {speed.ours}\nstock  {speed.other}\nratio  {speed.ratio}; goal {GOAL:g} or more: "
          f"{'met' if speed.ratio.median >= GOAL else 'MISSED'}")
    print(f"CPU of the training process with 1 loader process: {with_process['1 loader process']}")
    of_many = {f"of a million shards, {name}": summary for name, summary in starts_of_many.items()}
    for name, summary in {**starts, **of_many, **costs}.items():
        print(f"{name}: {summary}")
    print(f"slowest position over fastest: {flatness:.3f}; of a million shards {flatness_of_many:.3f}")
    write_results("loader", {"windows_of_tokens": SEQ_LEN + 1, "throughput": speed, "goal": GOAL,
                             "training_process_with_loader_process": with_process, "time_to_first_batch": starts,
                             "slowest_position_over_fastest": flatness,
                             "time_to_first_batch_of_a_million_shards": starts_of_many,
                             "slowest_position_over_fastest_of_a_million_shards": flatness_of_many, "order": costs})


if __name__ == "__main__":
    main()
