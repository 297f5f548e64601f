"""Encoders judged while they train: the same figures on any number of ranks, and the log line of the monitor."""

from __future__ import annotations

import csv
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.beir import write_beir
from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from evaluation.embedding_data import ScoredPairs, judgements_of_split, read_beir
from evaluation.embedding_training import (
    EmbeddingEvaluator,
    health_warnings,
    progress_name,
    spectra_figures,
    untrained_semantics,
)
from evaluation.vectors import TextTokens
from pretrain.config.interval import Interval
from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.models.base import BuildContext, EncoderOutput
from pretrain.models.baseline.family import build
from pretrain.models.baseline.schema import BaselineConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a small BERT on 400 pairs, of which a share is validation, with judged pairs beside."""
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "positive"])
        rows.writerows([f"question {i} about thing {i * 7}", f"the thing {i * 7} is what {i} asks"] for i in range(400))
    prepare(PrepConfig.model_validate({
        "out": str(folder / "set"), "splits": {"val": 0.3},
        "sources": [{"kind": "pair_table", "name": "rows", "path": str(folder / "rows.csv")}],
        "tokenizer": {"vocab_size": 300}, "workers": 1}))
    (folder / "sts.csv").write_text("".join(f"thing {i},thing {i + i % 5},{5 - i % 5}\n" for i in range(60)))
    target = load_run_config("spectra-m456", ["eval.embedding.sts=sts.csv"]).config.eval.embedding.target_sts
    return RunConfig.model_validate({
        "model": {"family": "baseline", "body": "bert", "vocab_size": 300, "hidden_size": 32, "num_layers": 1,
                  "num_heads": 2, "max_position_embeddings": 64},
        "data": {"seq_len": 64, "source": {"kind": "pairs", "path": str(folder / "set"), "query_length": 32,
                                           "passage_length": 64}},
        "objective": {"name": "contrastive"},
        "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        "eval": {"every": "500 micro_steps", "embedding": {
            "sts": str(folder / "sts.csv"), "target_sts": target, "quick_pairs": 20, "queries": 40, "pool": 100}}})


class View:
    """One of several ranks, all in this process."""

    def __init__(self, config: RunConfig, model: torch.nn.Module, rank: int, world: int, parts: dict[int, torch.Tensor],
                 barrier: threading.Barrier) -> None:
        self.config, self.model, self.rank, self.world = config, model, rank, world
        self.device, self.step, self.forwards = torch.device("cpu"), 126, 0
        self.zero_gradients: float | None = None
        self._parts, self._barrier = parts, barrier

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        self.forwards += 1
        with torch.no_grad():
            return self.model(**inputs)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._parts[self.rank] = tensor.clone()
        self._barrier.wait()
        tensor.copy_(torch.stack([self._parts[rank] for rank in range(self.world)]).sum(0))
        self._barrier.wait()
        return tensor


def evaluate(config: RunConfig, world: int, model: torch.nn.Module | None = None) -> tuple[list[EvalResult], set[int]]:
    """Results of all ranks, and how many forwards each ran."""
    if model is None:
        assert isinstance(config.model, BaselineConfig)
        model = build(config.model, BuildContext(seed=0)).eval()
    parts: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(world, timeout=60)
    views = [View(config, model, rank, world, parts, barrier) for rank in range(world)]
    found: dict[int, EvalResult] = {}

    def run(rank: int) -> None:
        found[rank] = EmbeddingEvaluator(config.eval.every, config.eval.embedding).evaluate(views[rank])
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[rank] for rank in range(world)], {view.forwards for view in views}


def test_figures_do_not_depend_on_the_number_of_ranks(config: RunConfig) -> None:
    alone = evaluate(config, 1)[0][0].metrics
    for world in (2, 3):
        results, forwards = evaluate(config, world)
        assert len(forwards) == 1
        for result in results:
            for name, metric in result.metrics.items():
                # A last batch of the loss that is not full falls to another place with another number of ranks.
                assert metric.value == pytest.approx(alone[name].value, abs=1e-5), name
                assert metric.n == alone[name].n, name


def test_an_untrained_encoder_is_near_chance_and_the_loss_near_the_log_of_the_batch(config: RunConfig) -> None:
    found = evaluate(config, 1)[0][0].metrics
    assert found["val/loss"].value == pytest.approx(3.47, abs=0.6)  # ln 32
    assert found["val/loss"].n % 32 == 0
    assert found["val/recall@10"].n == 40
    assert 0 < found["val/effective_rank"].value <= 32


def test_the_monitor_tells_the_multiple_that_was_due(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pretrain"):
        found = evaluate(config, 1)[0][0].metrics
    quick, whole = found["val/sts_quick"].value, found["val/sts_spearman"].value
    assert [line for line in caplog.messages if "[MONITOR]" in line] == [
        "[MONITOR] Running quick STS evaluation at step 500...",
        f"[MONITOR] STS-B: {quick:.4f} | Target: 0.8250 | Progress: {100 * quick / 0.825:.1f}%",
        f"[MONITOR] STS-B of all 60 pairs: {whole:.4f} (above: 20 of them)"]
    assert found["val/sts_quick"].n == 20


def test_distractors_are_drawn_from_all_of_train_and_are_those_of_the_beir_folder(config: RunConfig,
                                                                                 tmp_path: Path) -> None:
    folder = Path(config.data.source.path)  # type: ignore[attr-defined]
    own = judgements_of_split(folder, "val")
    wide = judgements_of_split(folder, "val", pool=len(own.passages) + 20)
    assert wide.passages[:len(own.passages)] == own.passages
    added, stored = wide.passages[len(own.passages):], judgements_of_split(folder, "train").passages
    places = [stored.index(passage) for passage in added]
    assert len(set(places)) == 20
    assert max(places) > len(stored) / 2 > min(places)
    assert places != sorted(places)
    assert wide == judgements_of_split(folder, "val", pool=len(own.passages) + 20)
    tokens = TextTokens.of_dataset(folder, None)
    write_beir(folder, "val", tmp_path, pool=len(wide.passages))
    assert [tokens.tokenizer.encode(text, add_special_tokens=False).ids for text in read_beir(
        tmp_path, "val").passages] == wide.passages


@pytest.mark.parametrize(("step", "every", "told"), [(0, "500 micro_steps", "0"), (126, "500 micro_steps", "500"),
                                                     (250, "500 micro_steps", "1000"), (7, "5 steps", "5")])
def test_where_a_run_stands_is_told_in_the_unit_of_its_interval(config: RunConfig, step: int, every: str,
                                                                told: str) -> None:
    changed = config.model_copy(update={"eval": config.eval.model_validate({"every": every})})
    view = View(changed, torch.nn.Identity(), 0, 2, {}, threading.Barrier(1))
    view.step = step
    assert progress_name(view) == told


def test_a_collapsed_model_is_told_and_a_healthy_one_is_not(config: RunConfig) -> None:
    view = View(config, torch.nn.Identity(), 0, 1, {}, threading.Barrier(1))
    view.step = 1250  # 4 micro-steps each: 5000
    healthy = {"val/mean_cosine": 0.3, "val/effective_rank": 200.0, "val/anomaly_std": 0.02,
               "val/spectral_entropy": 3.0, "val/dead_matrices": 0.3}
    sick = {"val/mean_cosine": 0.81, "val/effective_rank": float("nan"), "val/anomaly_std": 0.009,
            "val/spectral_entropy": 0.9, "val/dead_matrices": 0.34}

    def told(values: Mapping[str, float]) -> list[str]:
        return health_warnings({k: Metric(v, 512, True) for k, v in values.items()}, view, config.eval.embedding)
    assert told(healthy) == []
    assert [line.split()[2] for line in told(sick)] == list(sick)
    assert told({"val/mean_cosine": 0.81})[0].startswith("step 1250: val/mean_cosine 0.81 is above 0.8:")
    assert told({"val/mean_cosine": float("nan")})[0].startswith("step 1250: val/mean_cosine nan is no number:")
    view.step = 1249
    assert told(sick) == []


@pytest.mark.parametrize("sets", [("model.enable_semantic=false",), (
    "model.profile=compat", "objective.profile=compat")])
def test_sts_is_that_of_the_ranking_head_where_nothing_trains_the_semantic_one(
        config: RunConfig, caplog: pytest.LogCaptureFixture, sets: tuple[str, ...]) -> None:
    """Also where the head is still there: in compat the bridge pulls at it."""
    spectra = load_run_config("spectra-m456", ["objective.enable_semantic_nce=false", *sets]).config
    assert untrained_semantics(spectra) == "ranking_1536"
    for other in (load_run_config("spectra-m456").config, config):
        assert untrained_semantics(other) is None

    class Heads(Drawn):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> EncoderOutput:
            output = super().forward(input_ids, attention_mask)
            assert output.heads is not None
            return EncoderOutput({"own": output.heads["own"].roll(1, 0), "ranking_1536": output.heads["own"]}, "own")

    view = View(config.model_copy(update={"model": spectra.model, "objective": spectra.objective}),
                Heads(collapsed=False), 0, 1, {}, threading.Barrier(1))
    pairs = ScoredPairs(["thing 1", "thing 2", "thing 3"], ["thing 1", "thing 2", "thing 4"], [5.0, 5.0, 0.0], "three")
    tokens = TextTokens.of_dataset(Path(config.data.source.path), 64)  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO, "pretrain"):
        found = EmbeddingEvaluator(None, config.eval.embedding)._sts(view, tokens, pairs)
    assert any("[MONITOR] STS is that of ranking_1536: objective.enable_semantic_nce is false" in line
               for line in caplog.messages)
    assert found["val/sts_spearman"].value > 0.8  # of the rolled vectors no pair is alike


class Drawn(torch.nn.Module):
    """Every text has a vector of its own, drawn by its ids; or all have nearly the same."""

    def __init__(self, *, collapsed: bool) -> None:
        super().__init__()
        self.collapsed = collapsed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> EncoderOutput:
        texts = [hash(tuple(ids[mask.bool()].tolist())) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        own = torch.stack([torch.randn(256 + 1 + 64, generator=torch.Generator().manual_seed(key)) for key in texts])
        if self.collapsed:
            own = own * torch.cat([torch.full((5,), 0.02), torch.zeros(251), torch.full((65,), 1e-3)])
            own = own + torch.cat([torch.ones(256), torch.zeros(1), 50 * torch.eye(64)[0]])
        return EncoderOutput(heads={"own": torch.nn.functional.normalize(own[:, :256], dim=1)}, default="own",
                             aux={"anomaly_score": 0.5 * own[:, 256].sigmoid(), "spectral": own[:, 257:]})


def test_a_collapsed_toy_model_is_told_by_the_evaluator_and_a_healthy_one_is_not(
        config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Acceptance test 8, from vectors to lines of the log."""
    embedding = config.eval.embedding.model_copy(update={"health_after": Interval(1, "steps"), "sts": None})
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"embedding": embedding})})
    told = {}
    for collapsed in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, "pretrain"):
            evaluate(config, 2, Drawn(collapsed=collapsed))
        told[collapsed] = [line.split()[3] for line in caplog.messages if line.startswith("[HEALTH]")]
    assert told[False] == []
    assert told[True] == ["val/mean_cosine", "val/effective_rank", "val/anomaly_std", "val/spectral_entropy"]


def test_equal_vectors_are_a_collapse_and_spectra_tells_of_its_branches() -> None:
    spectral = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    figures = spectra_figures(EncoderOutput(heads={}, default="x", aux={
        "anomaly_score": torch.tensor([0.1, 0.3]), "spectral": spectral}))
    assert figures["entropy"].flatten().tolist() == pytest.approx([1.386294, 0.0], abs=1e-5)
    assert figures["anomaly"].shape == (2, 1)
    assert spectra_figures(EncoderOutput(heads={}, default="x", aux={})) == {}
