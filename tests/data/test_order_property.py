"""The order property in every kind of source: what a run sees is a function of the data and the seed alone.

Whatever the ranks, the accumulation, the loader processes and the restarts: batch k, put together again, is the very
one of an undisturbed run on one rank that takes the whole batch at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import PrepConfig
from data_prep.packing import make_plan
from data_prep.pipeline import prepare
from pretrain.config.load import load_run_config
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.open import TrainingData, open_training

BATCH, UPDATES = 72, 6  # every product of worlds and accumulations below divides the batch
Batches = list[dict[str, torch.Tensor]]
KINDS = ("stride", "lanes", "packing", "pairs", "mixture", "temperature", "curriculum", "remote")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `docs`, with a packing plan for 16 tokens, `more` and `pairs`."""
    root = tmp_path_factory.mktemp("order")
    for name, start in (("docs", 0), ("more", 500)):
        rows = [json.dumps({"text": f"text number {i} " * (1 + i % 5)}) + "\n" for i in range(start, start + 60)]
        (root / f"{name}.jsonl").write_text("".join(rows))
    (root / "pairs.csv").write_text("query,positive,negative\n" + "".join(
        f"what is {i},it is {i},it is not {i}\n" for i in range(60)))
    made = {name: prepare(PrepConfig.model_validate({
        "out": str(root / name), "tokenizer": {"vocab_size": 300} if name == "docs" else {
            "path": str(root / "docs" / "tokenizer.json")}, "workers": 1, "splits": {"val": 0.1},
        "sources": [{"name": "s", "path": str(root / f"{name}.{end}"), "kind": kind,
                     **({"negatives": ["negative"]} if name == "pairs" else {})}]}))
        for name, end, kind in (("docs", "jsonl", "jsonl"), ("more", "jsonl", "jsonl"), ("pairs", "csv", "pair_table"))}
    make_plan(made["docs"], "train", 16)
    return root


def config_of(kind: str, root: Path) -> RunConfig:
    """A run on a source of this kind."""
    shards = {"kind": "shards", "path": str(root / "docs")}
    parts = [{"source": shards}, {"source": shards | {"path": str(root / "more")}}]
    mixture: dict[str, Any] = {"kind": "mixture", "parts": parts, "period": 6}
    sources: dict[str, tuple[dict[str, Any], list[str]]] = {
        "stride": (shards, ["data.stride=5"]),
        "lanes": (shards, ["data.order={chunk_windows: 3, group_chunks: 2, lanes: 4}"]),
        "packing": (shards | {"packing": "best_fit"}, []),
        "pairs": ({"kind": "pairs", "path": str(root / "pairs"), "query_length": 8, "passage_length": 16,
                   "negatives_per_query": 1}, []),
        "mixture": (mixture | {"parts": [part | {"weight": w} for part, w in zip(parts, (2, 1), strict=True)]}, []),
        "temperature": (mixture | {"temperature": 0.5}, []),
        "curriculum": (mixture | {"curriculum": [{"steps": 3, "weights": [1, 0]}, {"weights": [1, 2]}]}, []),
        "remote": ({"kind": "remote", "url": f"pipe:cat {root / 'docs'}/{{name}}", "cache": str(root / "cache")}, []),
    }
    source, sets = sources[kind]
    return load_run_config("spectra-tiny" if kind == "pairs" else "demo", [
        f"data.source={json.dumps(source)}", "data.seq_len=16", "train.length=100 steps", *sets]).config


def split(world: int, accumulation: int) -> ResolvedBatch:
    return ResolvedBatch(global_batch_size=BATCH, micro_batch_size=BATCH // world // accumulation,
                         gradient_accumulation_steps=accumulation, data_parallel_size=world)


def seen(data: TrainingData, world: int, accumulation: int, start: int, stop: int, workers: int = 0) -> Batches:
    """The global batches [start, stop) put together again from what every rank gets."""
    ranks = []
    for rank in range(world):
        with UpdateLoader(data.source, data.order, split(world, accumulation), rank=rank, start_k=start,
                          workers=workers) as loader:
            ranks.append(list(islice(loader, stop - start)))
    found = []
    for update in zip(*ranks, strict=True):
        micro = [each for part in update for each in part.micro_batches]
        assert len(micro) == world * accumulation
        found.append({"sample_ids": torch.cat([each.sample_ids for each in micro]),
                      **{name: torch.cat([each[name] for each in micro]) for name in micro[0].tensors}})
    return found


@dataclass
class Run:
    """A source and its undisturbed run."""

    kind: str
    data: TrainingData = field(repr=False)
    batches: Batches = field(repr=False)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, prepared: Path) -> Run:
    data = open_training(config_of(request.param, prepared), split(1, 1))
    return Run(request.param, data, seen(data, 1, 1, 0, UPDATES))


def assert_same(found: Batches, want: Batches) -> None:
    assert len(found) == len(want)
    for k, (one, other) in enumerate(zip(found, want, strict=True)):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], k


@settings(deadline=None, derandomize=True, max_examples=15)
@given(stops=st.sets(st.integers(1, UPDATES - 1), max_size=3),
       splits=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3])), min_size=4, max_size=4))
def test_batches_do_not_depend_on_ranks_accumulation_and_restarts(run: Run, stops: set[int],
                                                                  splits: list[tuple[int, int]]) -> None:
    found = []
    for (start, stop), (world, accumulation) in zip(pairwise([0, *sorted(stops), UPDATES]), splits, strict=False):
        found += seen(run.data, world, accumulation, start, stop)
    assert_same(found, run.batches)


def test_batches_do_not_depend_on_loader_processes(run: Run) -> None:
    assert_same(seen(run.data, 2, 2, 3, UPDATES, workers=2), run.batches[3:])
