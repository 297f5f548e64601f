"""Needles from training to verdict, on the real engine: what a user of the AFRB presets finds in the run folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.needle_eval import evaluate_needle
from evaluation.needle_variants import BETAS
from evaluation.offline import Request
from evaluation.target import open_target
from pretrain.runfolder.layout import RunFolder
from tests.cli.warm import Warm

SIZES = {"model_type": "llama", "vocab_size": 1224, "hidden_size": 128, "intermediate_size": 128,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "tie_word_embeddings": False}
TINY: dict[str, Any] = {
    "extends": "afrb-retrieve",
    "model": {"pvm_dk": 128, "pvm_dv": 128, "backbone": {"weights": None, "hf_config": SIZES}},
    "data": {"source": {"vocab_size": 1224, "ctx_chunk_len": 32, "needle_eval_examples": 20,
                        "needle_test_examples": 200}},
    "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    "engine": {"precision": "fp32"}, "train": {"length": "4 steps"}, "eval": {"every": "2 steps"},
    "monitor": {"log_every": "1 steps", "tensorboard": False, "progress": "off"}, "launch": {"threads": 1}}
COLUMNS = ["step", "train_loss", "val_loss", "lr", "grad_norm", "needle_hit_rate", "needle_hit_rate_topk",
           "needle_exact_match", "avg_correct_tokens_per_needle", "phase_coherence", "pvm_gate_strength",
           "pvm_memory_norm", "entropy_flow", "gamma_saturation", "lm_loss", "infonce_loss", "infonce_acc",
           "needle_hit_rate_tf", "needle_echo_rate", "tokens_per_s", "max_mem_gb"]


def train(warm: Warm, folder: Path, name: str, *sets: str, **sections: Any) -> RunFolder:
    """Train TINY with sections merged one level deep."""
    values = {**TINY, "name": name}
    for key, section in sections.items():
        values[key] = {**values[key], **section}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    words = ["train", f"{name}.yaml", *(word for value in sets for word in ("--set", value))]
    run = warm.start(folder, words)
    assert run.wait(240) == 0, run.stderr
    return RunFolder(folder / "runs" / name)


def table(folder: RunFolder) -> list[dict[str, str]]:
    with open(folder.metrics_csv, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """A memory that retrieves as built, and its null."""
    folder = tmp_path_factory.mktemp("needles")
    memory = train(warm, folder, "memory", "objective.infonce_weight=0.3")
    null = train(warm, folder, "null", "model.n_afrb=2", "model.phase_mode=none", "model.enable_pvm=false",
                 "model.readout_from=none", "train.length=2 steps")
    return memory, null


def test_the_table_leads_with_the_original_s_columns_and_begins_at_step_0(runs):
    rows = table(runs[0])
    assert list(rows[0])[:21] == COLUMNS
    assert COLUMNS[9] == "phase_coherence", "users cut column 10"
    evaluated = {int(row["step"]): row for row in rows if row["val_loss"]}
    assert sorted(evaluated) == [0, 2, 4]
    assert all(float(row["needle_hit_rate"]) > 0.9 and float(row["phase_coherence"]) > 0 for row in evaluated.values())
    trained = [row for row in rows if row["train_loss"]]
    assert [int(row["step"]) for row in trained] == [1, 2, 3, 4]
    assert all(float(row["lm_loss"]) > 0 and float(row["infonce_loss"]) > 0 and not row["needle_hit_rate"]
               for row in trained)
    first = trained[0]
    assert float(first["train_loss"]) == pytest.approx(float(first["lm_loss"]) + 0.3 * float(first["infonce_loss"]))
    names = {line.split(",")[1] for line in runs[0].metrics_long_csv.read_text().splitlines()[1:]}
    assert {"train_loss", "needle_hit_rate", "phase_coherence", "infonce_acc"} <= names


def test_the_log_has_what_people_grep(runs):
    log = runs[0].log_file.read_text()
    assert "command: pretrain train memory.yaml --set objective.infonce_weight=0.3" in log.splitlines()[0]
    assert "step 4/4 | loss " in log
    assert "[NEEDLE-EVAL] Exact hit rate: " in log
    assert "[NEEDLE-EVAL] Top-5 hit rate: " in log
    assert "[DIAG:H1] " in log


def test_metrics_json_has_the_final_figures(runs):
    found = json.loads(runs[0].metrics_json.read_text())
    assert (found["task"], found["seed"], found["steps"]) == ("needle", 41, 4)
    assert found["needle_hit_rate"] > 0.9
    assert found["infonce"]["chance"] == pytest.approx(4.8598, abs=1e-4)
    (block,) = found["block_profile"]
    assert (block["alpha"], block["omega"], block["phi"]) == (0.04, 6.0, 0.0)
    assert block["gamma"] != 0.2 and block["gamma"] == pytest.approx(0.2, abs=0.05), "as trained, not as it began"
    assert (found["preset"], found["model"]) == ("memory", "afrb on llama")
    assert found["params_trainable"] < found["params_total"]


@pytest.mark.slow
def test_the_whole_table_of_controls_and_a_verdict(runs):
    memory, null = runs
    target = open_target(str(memory.root))
    results = evaluate_needle(target, Request(controls=True, null=str(null.root), batch_size=50), ["pretrain"])
    rows = {row["name"]: row for row in [*results.details["controls"], *results.details["references"]]}
    assert results.metrics["test/needle_hit_rate"].value > 0.9
    reach = [rows.pop(f"beta_{beta:g}")["value"] for beta in BETAS]
    assert max(reach[:3]) < 0.01 < 0.9 < reach[3] < reach[4], "what is found grows with what is kept"
    assert {name: row["passed"] for name, row in rows.items()} == {
        "null_adapter": None, "shuffled_needle": True, "permuted_needle": True, "query_removed": True,
        "wrong_key": True, "memory_zero": True, "readout_off": None, "backbone_without_attention": True}
    assert rows["permuted_needle"]["bag"] > 0.9, "it gives what is stored, in the order in which it is stored"
    assert rows["null_adapter"]["value"] < 0.01
    assert rows["backbone_without_attention"]["value"] < 0.01
    assert all(check["passed"] for check in results.details["checks"])
    assert results.details["verdict"]["outcome"] == "retrieval"
    assert results.passed is None


def test_what_has_nothing_to_train_is_refused_in_one_line(warm, tmp_path):
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({**TINY, "name": "bare", "model": {
        **TINY["model"], "n_afrb": 0, "enable_pvm": False, "readout_from": "none"}}))
    run = warm.start(tmp_path, ["train", "bare.yaml"])
    assert run.wait(60) == 2
    assert run.errors == ["error: bare: the model has nothing to train; evaluate it as it is with `pretrain eval "
                          "CONFIG`"]
