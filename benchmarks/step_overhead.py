"""What the trainer costs on top of DeepSpeed, and what DeepSpeed costs on top of PyTorch.

One process, fp32, ZeRO-2, a Llama of 29M parameters, 4 x 256 tokens a step, the same masks and data on every side:

- trainer: our loop, reading shards, writing a row to metrics.jsonl, metrics.csv and TensorBoard after every step;
- engine: the very same DeepSpeed engine in a ten-line loop over tensors in memory;
- bare: plain PyTorch, AdamW and clipping.

Seconds of a step, in pairs whose order alternates; a ratio is of one pair's own two values.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from benchmarks.harness import Summary, cpu_seconds, lone_world, write_results
from data_prep.manifest import Manifest, write_manifest
from data_prep.shards import ShardWriter, token_dtype
from pretrain.config.load import load_run_config
from pretrain.data.batch import Batch
from pretrain.engine.claim import claim_run
from pretrain.engine.distributed import World
from pretrain.engine.setup import prepare
from pretrain.engine.trainer import Trainer
from pretrain.models.baseline.family import FAMILY

ROUNDS = 14
SEQ_LEN, MICRO, VOCAB = 256, 4, 8192
MODEL = {"family": "baseline", "body": "llama", "vocab_size": VOCAB, "hidden_size": 512, "num_layers": 8,
         "num_heads": 8, "intermediate_size": 1344, "max_position_embeddings": 512}


def main() -> None:
    """Run the rounds and keep the results."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = lone_world()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), world)
        batches = [next(trainer.loader).micro_batches[0] for _ in range(ROUNDS + 1)]
        engine, bare = _engine_side(trainer, batches), _bare_side(trainer, batches)
        rows = {"trainer / engine": _pairs(trainer.step, engine), "engine / bare": _pairs(engine, bare)}
        reading = [cpu_seconds(lambda: next(trainer.loader)) for _ in range(ROUNDS)]
    results: dict[str, Any] = {"parameters": trainer.config.model.parameter_count().total, "pairs": ROUNDS,
                               "tokens_per_step": SEQ_LEN * MICRO}
    for name, clocks in rows.items():
        for clock, (mine, theirs) in clocks.items():
            for side, values in zip(name.split(" / "), (mine, theirs), strict=True):
                results[f"{name}, {clock} seconds of {side}"] = Summary.of(values, "s")
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            results[f"{name}, {clock} ratio"] = Summary.of(ratios, "x")
    stepping = rows["trainer / engine"]["cpu"][0]
    share = statistics.median(reading) / statistics.median(stepping)
    results["loader, share of the trainer's CPU"] = share
    for name, value in results.items():
        print(f"{name}: {value}")
    write_results("step_overhead", results)


def _trainer(folder: Path, world: World) -> Trainer:
    """Our side: shards on disk, a row of metrics after every step."""
    _dataset(folder / "data")
    config = {"name": "bench", "runs_dir": str(folder / "runs"), "model": MODEL, "objective": {"name": "causal_lm"},
              "data": {"seq_len": SEQ_LEN, "source": {"kind": "shards", "path": str(folder / "data")}},
              "batch": {"global_batch_size": MICRO}, "train": {"length": "1000 steps"},
              "schedule": {"name": "constant", "warmup": None}, "engine": {"zero_stage": 2, "precision": "fp32"},
              "monitor": {"log_every": "1 steps", "progress": "off"}, "eval": {"every": None},
              "checkpoint": {"every": None}}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = load_run_config(path)
    return prepare(loaded, world, claim_run(loaded, world), [], Console(quiet=True))


def _dataset(folder: Path) -> Manifest:
    """Random documents of 20 to 2000 tokens: windows with and without document edges."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", dtype=token_dtype(VOCAB)) as writer:
        for number in range(500):
            tokens = generator.integers(1, VOCAB, generator.integers(20, 2000)).astype(token_dtype(VOCAB))
            writer.push(tokens, utf8_bytes=4 * len(tokens), source=0, doc_hash=number, provenance={"document": number})
    return write_manifest(folder, Manifest(tokenizer_sha256=None, dtype="<u2", block_tokens=16384, eos_id=0,
                                           vocab_size=VOCAB, splits={"train": writer.record}, provenance={}))


def _engine_side(trainer: Trainer, batches: Sequence[Batch]) -> Callable[[], object]:
    """The very same engine without our loop: a second one in the process was 6% slower or faster by where it lay."""
    ds = trainer.engine.ds
    turn = _endless(batches)

    def step() -> None:
        inputs = next(turn).tensors
        output = ds(input_ids=inputs["input_ids"], labels=inputs["labels"], document_ids=inputs["document_ids"])
        ds.backward(output.nll_sum / output.n_tokens)
        ds.step()
    return step


def _bare_side(trainer: Trainer, batches: Sequence[Batch]) -> Callable[[], object]:
    """Plain PyTorch."""
    from pretrain.models.base import BuildContext
    config = trainer.config
    model = FAMILY.build(config.model, BuildContext(seed=config.seed)).train()
    groups = [{"params": g.params, "weight_decay": g.weight_decay}
              for g in FAMILY.parameter_groups(model, config.optim)]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
    turn = _endless(batches)

    def step() -> None:
        inputs = next(turn).tensors
        output = model(input_ids=inputs["input_ids"], labels=inputs["labels"], document_ids=inputs["document_ids"])
        (output.nll_sum / output.n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return step


def _endless(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _pairs(one: Callable[[], object], other: Callable[[], object]) -> dict[str, tuple[list[float], list[float]]]:
    """CPU and wall seconds of both sides in pairs whose order alternates (A B, B A, ...), after one to warm up.

    So each side comes as often after itself as after the other: a step is slower after one of another kind, whose
    freed memory it does not find again.
    """
    found: dict[str, tuple[list[float], list[float]]] = {"cpu": ([], []), "wall": ([], [])}
    for number in range(ROUNDS + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            (one, other)[side]()
            if number:
                found["cpu"][side].append(time.process_time() - cpu)
                found["wall"][side].append(time.perf_counter() - wall)
    return found


if __name__ == "__main__":
    main()
