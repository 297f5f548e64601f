"""Figures do not depend on how the validation data is split over batches and ranks, and equal a slow recount."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from evaluation.perplexity import PerplexityEvaluator, ValidationData, figures, read_token_bytes, tally
from pretrain.config.interval import Interval
from pretrain.config.source import MixtureConfig
from pretrain.data.open import eval_batches
from pretrain.errors import ConfigError, DataCorruption
from pretrain.models.base import LMOutput

CPU = torch.device("cpu")


class Bigram:
    """A fixed table of log-probabilities given the current token, as a model."""

    def __init__(self, vocab, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.table = torch.log_softmax(torch.randn(vocab, vocab, generator=g, dtype=torch.float64) * 2, -1)
        self.calls = 0

    def __call__(self, *, input_ids, labels, document_ids):
        self.calls += 1
        kept = labels != -100
        logits = self.table[input_ids]
        nll = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return LMOutput(nll_sum=nll[kept].sum().float(), n_tokens=kept.sum(),
                        n_correct=((logits.argmax(-1) == labels) & kept).sum())


def slow(model, source, token_bytes):
    """One token at a time."""
    nll, tokens, correct, n_bytes = 0.0, 0, 0, 0
    for i in range(len(source)):
        window = source.get(np.array([i]))
        for token, label in zip(window["input_ids"][0].tolist(), window["labels"][0].tolist(), strict=True):
            if label != -100:
                nll -= float(model.table[token, label])
                tokens += 1
                correct += int(model.table[token].argmax()) == label
                n_bytes += int(token_bytes[label])
    return nll, tokens, correct, n_bytes


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_figures_equal_a_slow_recount(run_config, batch_size):
    data, model = ValidationData.open(run_config), Bigram(400)
    sums = tally(model, eval_batches(data.source, rank=0, world=1, batch_size=batch_size), CPU, data.token_bytes)
    metrics = figures(sums, has_bytes=True).metrics
    nll, tokens, correct, n_bytes = slow(model, data.source, data.token_bytes)
    assert metrics["val/loss"].value == pytest.approx(nll / tokens, rel=1e-7)
    assert metrics["val/perplexity"].value == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert metrics["val/accuracy"].value == correct / tokens and metrics["val/accuracy"].higher_is_better
    assert metrics["val/bits_per_byte"].value == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-7)
    assert (metrics["val/loss"].n, metrics["val/bits_per_byte"].n) == (tokens, n_bytes)


def test_intervals_contain_the_figure_and_need_two_clusters(run_config):
    data, model = ValidationData.open(run_config), Bigram(400)
    sums = tally(model, eval_batches(data.source, rank=0, world=1, batch_size=4), CPU, data.token_bytes)
    for name, metric in figures(sums, has_bytes=True).metrics.items():
        low, high = metric.ci
        assert low < metric.value < high, name
    assert all(m.ci is None for m in figures(sums[:1], has_bytes=True).metrics.values())
    assert all(m.ci is None for m in figures(sums * [math.nan, 1, 1, 1], has_bytes=True).metrics.values())


def evaluate(config, world, evaluator_of, model):
    """All ranks in threads; `all_reduce` adds up over them."""
    barrier, boxes, results = threading.Barrier(world), [None] * world, [None] * world

    def rank_main(rank):
        def all_reduce(tensor):
            boxes[rank] = tensor
            barrier.wait()
            total = sum(boxes)
            barrier.wait()
            return tensor.copy_(total)
        view = SimpleNamespace(config=config, step=1, rank=rank, world=world, device=CPU, forward=model,
                               all_reduce=all_reduce)
        results[rank] = evaluator_of().evaluate(view)

    threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("max_batches", [None, 3])
def test_all_ranks_agree_and_the_world_size_changes_nothing(run_config, max_batches):
    model = Bigram(400)
    found = {}
    for world in (1, 2, 4):
        results = evaluate(run_config, world, lambda: PerplexityEvaluator(Interval(5, "steps"), max_batches), model)
        assert all(r.metrics == results[0].metrics for r in results)
        found[world] = results[0].metrics
    for name, metric in found[1].items():
        for world in (2, 4):
            assert found[world][name].value == pytest.approx(metric.value, rel=1e-7)
            assert found[world][name].n == metric.n
    if max_batches:
        data = ValidationData.open(run_config)
        assert found[1]["val/loss"].n <= 3 * 8 * 64 < len(data.source) * 64


def test_a_second_evaluation_reuses_the_data_and_gives_the_same(run_config, monkeypatch):
    evaluator, model = PerplexityEvaluator(None), Bigram(400)
    first = evaluate(run_config, 1, lambda: evaluator, model)
    monkeypatch.setattr("evaluation.perplexity.open_validation", lambda config: pytest.fail("opened again"))
    assert evaluate(run_config, 1, lambda: evaluator, model)[0].metrics == first[0].metrics


def test_without_validation_data_the_key_is_named(dataset, run_config):
    only_train = run_config.model_copy(update={"data": run_config.data.model_copy(update={
        "source": run_config.data.source.model_copy(update={"split": "val"})})})
    assert ValidationData.open(only_train).source.split.name == "val"
    part = {"weight": 1, "source": {"kind": "shards", "path": str(dataset)}}
    mixture = MixtureConfig.model_validate({"parts": [part]})
    none = run_config.model_copy(update={"data": run_config.data.model_copy(update={"source": mixture})})
    with pytest.raises(ConfigError, match=r"data\.validation"):
        ValidationData.open(none)


def test_token_bytes_are_read_back_or_their_fault_is_named(dataset, run_config, tmp_path):
    source = ValidationData.open(run_config).source
    table = read_token_bytes(source)
    text_bytes = Manifest.load(dataset).splits["val"].bytes
    tokens = np.concatenate([source.get(np.array([i]))["input_ids"][0].numpy() for i in range(len(source))])
    assert abs(table[tokens].sum() - text_bytes) < 400, "windows drop less than a window of the split"
    broken = SimpleNamespace(folder=tmp_path, vocab_size=400)
    np.save(tmp_path / "token_bytes.npy", np.zeros(10, np.int32))
    monkey = object.__new__(type(source))
    monkey.__dict__.update(source.__dict__)
    monkey.manifest = broken
    with pytest.raises(DataCorruption, match=r"token_bytes\.npy.*\[10\]"):
        read_token_bytes(monkey)
    (tmp_path / "token_bytes.npy").write_bytes(b"nonsense")
    with pytest.raises(DataCorruption, match=r"token_bytes\.npy"):
        read_token_bytes(monkey)
