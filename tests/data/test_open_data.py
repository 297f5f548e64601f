"""From a config to training and validation data, and `pretrain data at`."""

import itertools
import json

import numpy as np
import pytest
from small_datasets import counting_documents, write_dataset
from typer.testing import CliRunner

from pretrain.cli.data import app
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.open import eval_batches, open_source, open_training, open_validation
from pretrain.data.synthetic import ArraySource
from pretrain.errors import ConfigError

MODEL = {"family": "baseline", "body": "llama", "vocab_size": 5000, "hidden_size": 16, "num_layers": 1,
         "num_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}


def run_config(source: dict, *, seed=1, batch=6, **data) -> RunConfig:
    return RunConfig.model_validate({
        "model": MODEL, "objective": {"name": "causal_lm"}, "seed": seed, "batch": {"global_batch_size": batch},
        "data": {"seq_len": 8, "source": source, **data}})


def whole(batch: int) -> ResolvedBatch:
    return ResolvedBatch(global_batch_size=batch, micro_batch_size=batch, gradient_accumulation_steps=1,
                         data_parallel_size=1)


def shards(manifest, **fields) -> dict:
    return {"kind": "shards", "path": str(manifest.folder), **fields}


def test_training_data_of_shards(dataset):
    manifest = dataset([300, 50])
    training = open_training(run_config(shards(manifest)), whole(6))
    assert training.epoch_samples == len(training.source) == 349 // 8
    first = training.samples(15)
    with UpdateLoader(training.source, training.order, whole(6), rank=0) as loader:
        rows = [row for update in itertools.islice(loader, 3) for row in update.micro_batches[0]["labels"].tolist()]
    assert first.sample_ids.tolist() == list(range(15))
    assert first["labels"].tolist() == rows[:15]


def test_order_fingerprint_changes_with_whatever_changes_a_batch(dataset):
    manifest = dataset([300, 50])
    def fingerprint(source=None, size=6, **changes):
        return open_training(run_config(source or shards(manifest), batch=size, **changes), whole(size)).fingerprint
    same = [fingerprint(), fingerprint(workers=3, prefetch=9), fingerprint(shards(manifest, verify="off"))]
    assert len(set(same)) == 1
    others = [fingerprint(size=12), fingerprint(seed=2), fingerprint(seq_len=9), fingerprint(stride=3),
              fingerprint(order={"lanes": 2}), fingerprint(order={"shuffle": False}),
              fingerprint(document_masking=False), fingerprint({"kind": "synthetic"})]
    assert len({same[0], *others}) == len(others) + 1


def test_mixture_from_config(dataset):
    parts = [{"weight": 3, "source": shards(dataset([300]))},
             {"weight": 1, "source": {"kind": "synthetic", "samples": 9, "vocab_size": 40, "pattern": "count"}}]
    config = run_config({"kind": "mixture", "parts": parts, "period": 4}, batch=8)
    training = open_training(config, whole(8))
    assert training.epoch_samples is None
    batch = training.samples(40)
    assert np.bincount(batch["source_index"].numpy()).tolist() == [30, 10]
    for row in np.flatnonzero(batch["source_index"].numpy() == 1):
        start = int(batch["source_ids"][row]) * 8
        assert batch["input_ids"][row].tolist() == [t % 40 for t in range(start, start + 8)]
    with pytest.raises(ConfigError, match="a mixture holds no mixtures"):
        open_source(run_config({"kind": "mixture", "parts": [
            {"weight": 1, "source": {"kind": "mixture", "parts": parts}}]}).data.source, config.data)


def test_parts_of_a_mixture_are_checked_when_the_config_is_read():
    with pytest.raises(Exception, match="smaples"):
        run_config({"kind": "mixture", "parts": [{"weight": 1, "source": {"kind": "synthetic", "smaples": 3}}]})


def test_validation_is_the_split_beside_the_training_split(dataset):
    manifest = dataset([300, 50], val=[40, 33])
    source = open_validation(run_config(shards(manifest), stride=2))
    assert source.get(np.arange(9))["input_ids"].ravel().tolist() == list(range(72))  # no overlap, from the val split
    assert open_validation(run_config(shards(dataset([300])))) is None
    assert open_validation(run_config({"kind": "synthetic"})) is None
    named = run_config({"kind": "synthetic"}, validation=shards(manifest, split="train"))
    assert len(open_validation(named)) == 349 // 8


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("max_samples", [None, 1, 10, 500])
def test_each_validation_window_counts_once_on_equal_numbers_of_batches(world, batch_size, max_samples):
    source = ArraySource(np.arange(25 * 4 + 1), seq_len=4)
    ranks = [list(eval_batches(source, rank=rank, world=world, batch_size=batch_size, max_samples=max_samples))
             for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert all(len(batch) == batch_size for batch in batches)
    chosen = sorted(i for batch in batches for i in batch.sample_ids.tolist() if i >= 0)
    n = min(max_samples or 25, 25)
    assert len(set(chosen)) == len(chosen) == n
    assert np.diff([*chosen, 25]).max() <= -(-25 // n)  # spread over the whole source, to its end
    labels = sorted(t for batch in batches for t in batch["labels"].ravel().tolist() if t != -100)
    assert labels == sorted(4 * i + j + 1 for i in chosen for j in range(4))


def test_data_at_shows_what_the_loader_served(dataset, tmp_path):
    manifest = dataset([300, 50])
    config = run_config(shards(manifest))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(config.model_dump(
        mode="json", include={"seed": True, "batch": {"global_batch_size"}}) | {
        "model": MODEL, "objective": {"name": "causal_lm"}, "data": {"seq_len": 8, "source": shards(manifest)}}))
    training = open_training(config, whole(6))
    with UpdateLoader(training.source, training.order, whole(6), rank=0, start_k=11) as loader:
        served = next(loader).micro_batches[0]
    result = CliRunner().invoke(app, ["at", str(run), "--batch", "11", "--rows", "0", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert shown["fingerprint"] == training.fingerprint
    assert [s["sample"] for s in shown["samples"]] == served.sample_ids.tolist() == list(range(66, 72))
    assert [s["window"] for s in shown["samples"]] == served["source_ids"].tolist()
    assert [s["text"] for s in shown["samples"]] == [" ".join(map(str, row)) for row in served["input_ids"].tolist()]
    assert [s["tokens"] for s in shown["samples"]] == [[w * 8, w * 8 + 7] for w in served["source_ids"].tolist()]
    for sample in shown["samples"]:
        documents = {int(t >= 300) for t in range(*sample["tokens"])} | {int(sample["tokens"][1] >= 300)}
        assert [d["document"] for d in sample["documents"]] == sorted(documents)


def test_a_document_cannot_steer_the_terminal(tmp_path):
    """Provenance is data too: an escape sequence in it is spelled out."""
    manifest = write_dataset(tmp_path / "dataset", {"train": counting_documents([30])},
                             provenance={"path": "\x9b2J\x1b[2J"})
    run = tmp_path / "config.yaml"
    run.write_text(json.dumps({"model": MODEL, "objective": {"name": "causal_lm"}, "batch": {"global_batch_size": 2},
                               "data": {"seq_len": 8, "source": shards(manifest)}}))
    result = CliRunner().invoke(app, ["at", str(run), "--batch", "0"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "\x9b" not in result.output
