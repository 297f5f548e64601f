"""Spectra from its data to its vectors by the commands of its page, on two ranks under ZeRO-3: one launch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from pretrain.cli.main import main
from tests.cli.tiny_run import checkpoints, losses, rows, status

pytestmark = pytest.mark.slow
THINGS = ["river", "table", "window", "engine", "garden", "letter", "market", "number", "paper", "stone"]
SETS = ("model.vocab_size=300", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=2", "model.ffn_inner=96",
        "model.spectral_dim=16", "data.source.path=set", "data.source.negatives_per_query=1", "engine.zero_stage=3",
        "engine.precision=fp32", "batch.global_batch_size=32", "batch.micro_batch_size=4", "train.length=8 steps",
        "schedule.warmup=2 steps", "checkpoint.every=2 steps", "checkpoint.mirror={path: disk, every: 2}",
        "eval.every=16 micro_steps", "eval.metric=val/sts_spearman", "eval.embedding.sts=dev.csv",
        "eval.embedding.target_sts=0.825", "eval.embedding.quick_pairs=40", "eval.embedding.queries=50",
        "eval.embedding.pool=120", "monitor.log_every=1 steps", "monitor.progress=off", "monitor.tensorboard=false",
        "launch.threads=1")
RUN = "runs/spectra-tiny"
Call = Callable[..., str]


@dataclass
class Trained:
    """A run folder below `folder`, and what its training said."""

    folder: Path
    said: list[str]

    @property
    def run(self) -> Path:
        return self.folder / RUN


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("spectra")
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["query", "positive", "negative"])
        table.writerows([f"where is {THINGS[i % 10]} {i}", f"the {THINGS[i % 10]} {i} is here",
                         f"the {THINGS[(i + 1) % 10]} {i} is there"] for i in range(260))
    prepare(PrepConfig.model_validate({
        "out": str(folder / "set"), "splits": {"val": 0.3}, "tokenizer": {"vocab_size": 300}, "workers": 1,
        "sources": [{"kind": "pair_table", "name": "rows", "path": str(folder / "rows.csv"),
                     "negatives": ["negative"]}]}))
    for split, first in (("dev", 0), ("test", 500)):
        (folder / f"{split}.csv").write_text("".join(
            f"where is {THINGS[i % 10]} {first + i},the {THINGS[(i + i % 4) % 10]} {first + i},{5 - i % 4}\n"
            for i in range(80)))
    words = [word for value in SETS for word in ("--set", value)]
    done = subprocess.run([sys.executable, "-P", "-m", "pretrain.cli.main", "train", "spectra-tiny", "--nproc", "2",
                           *words], cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return Trained(folder, [line.split(" pretrain: ", 1)[-1] for line in done.stderr.splitlines()])


@pytest.fixture
def call(trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in the folder of the run; its output."""
    monkeypatch.chdir(trained.folder)

    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return out
    return command


def test_training_writes_the_lines_of_the_original(trained: Trained) -> None:
    assert list(losses(trained.run)) == list(range(1, 9))
    assert status(trained.run).state == "done"
    assert list(checkpoints(trained.run).values()) == [[]] * len(checkpoints(trained.run))
    spearman, quick = rows(trained.run, "val/sts_spearman"), rows(trained.run, "val/sts_quick")
    assert list(spearman) == [4, 8]
    said = [line for line in trained.said if line.startswith("[MONITOR]")]
    expected = []
    for step, whole in spearman.items():
        share = 100 * quick[step] / 0.825
        expected += [f"[MONITOR] Running quick STS evaluation at step {4 * step}...",
                     f"[MONITOR] STS-B: {quick[step]:.4f} | Target: 0.8250 | Progress: {share:.1f}%",
                     f"[MONITOR] STS-B of all 80 pairs: {whole:.4f} (above: 40 of them)"]
    assert [line for line in said if "improvement" not in line] == expected
    copied = [line for line in trained.said if line.startswith("[DRIVE BACKUP]")]
    assert copied == [f"[DRIVE BACKUP] Checkpoint #{n} -> disk/spectra-tiny/checkpoints/step-{2 * n}.f1"
                      for n in (2, 4)]
    assert f"[CHECKPOINT] Saved -> {RUN}/checkpoints/step-8.f1" in trained.said
    assert {"val/loss", "val/ndcg@10", "val/recall@10", "val/effective_rank", "val/mean_cosine", "val/anomaly_std",
            "val/spectral_entropy", "val/dead_matrices"} <= {
        key for line in (trained.run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}


def test_a_run_is_evaluated_by_every_task(call: Call) -> None:
    sts = json.loads(call("eval", RUN, "--task", "sts", "--data", "test.csv", "--json"))
    assert sts["dataset"]["pairs"] == 80
    names = {name.split("/")[1] for name in sts["metrics"]}
    assert names == {"semantic_768", "semantic_512", "semantic_256", "entity_384", "entity_192", "entity_96",
                     "retrieval_128", "anchor_64", "ranking_1536"}
    assert "passages" in call("eval", RUN, "--task", "retrieval", "--baselines", "--head", "ranking_1536")
    found = json.loads(call("eval", RUN, "--task", "retrieval", "--json", "--head", "semantic_768", "--head",
                            "semantic_256", "--head", "semantic_768:100"))
    assert {"retrieval/semantic_256/retention", "retrieval/semantic_768:100/retention"} <= set(found["metrics"])
    assert "effective_rank" in call("eval", RUN, "--task", "collapse")
    assert call("eval", RUN, "--best", "--task", "sts", "--data", "dev.csv", "--head", "semantic_768")


def test_texts_are_embedded_by_every_form_of_the_command(call: Call, trained: Trained) -> None:
    (trained.folder / "texts.txt").write_text("where is river 1\nthe river 1 is here\n")
    call("embed", RUN, "--texts", "where is river 1", "--texts", "the river 1 is here", "--head", "semantic_768",
         "--dim", "256", "--out", "a.npz")
    call("embed", RUN, "--file", "texts.txt", "--head", "semantic_256", "--out", "b.npy")
    assert np.load("a.npz")["vectors"].shape == (2, 256)
    np.testing.assert_allclose(np.load("a.npz")["vectors"], np.load("b.npy"), atol=1e-5)
    call("embed", RUN, "--texts", "a text", "--head", "ranking_1536", "--out", "c.jsonl")


def test_both_layouts_of_weights_are_written(call: Call, trained: Trained) -> None:
    call("export", RUN, "--layout", "seed")
    written = {path.name: path for path in (trained.run / "export").rglob("*.pt")}
    assert {"best_sts.pt", "final.pt"} <= set(written)
    final = torch.load(written["final.pt"], weights_only=True)
    assert final["step"] == 8 and final["micro_step"] == 32
    assert all(value.isfinite().all() for value in final["model"].values())
    call("export", RUN)
    folder = trained.run / "export" / "step-8-fp32-wrapped"
    call("embed", str(folder), "--texts", "where is river 1", "--out", "from-export.npy")
    call("embed", RUN, "--texts", "where is river 1", "--out", "from-run.npy")
    np.testing.assert_allclose(np.load("from-export.npy"), np.load("from-run.npy"), atol=1e-5)


def test_the_size_is_estimated(call: Call) -> None:
    assert "memory a rank" in call("estimate", "spectra-tiny", *(w for value in SETS for w in ("--set", value)))
