"""metrics.json: the specification's names, from the last rows and the newest evaluation; null with a reason."""

import json
import math

import pytest

from evaluation.needle_eval import evaluate_needle
from evaluation.offline import Request
from evaluation.summary import summary, write_summary
from evaluation.target import open_target
from pretrain.config.run import RunConfig

KEYS = ["task", "preset", "seed", "steps", "world_size", "model", "params_trainable", "val_loss", "test_ppl",
        "needle_hit_rate", "needle_hit_rate_ci", "needle_hit_rate_topk", "needle_hit_rate_tf",
        "needle_exact_match", "avg_correct_tokens_per_needle", "needle_bag_rate", "needle_echo_rate", "nulls",
        "controls", "phase_coherence", "entropy_flow", "gamma_saturation", "pvm_gate_strength", "pvm_gate_delta",
        "pvm_memory_norm", "ridge", "infonce", "block_profile", "beta_at_min_distance", "diagnostics", "command",
        "args", "timing"]


@pytest.fixture
def needle_run(tmp_path, checkpointed):
    config = RunConfig.model_validate({
        "name": "needles", "runs_dir": str(tmp_path), "seed": 41,
        "model": {"family": "baseline", "body": "llama", "vocab_size": 300, "hidden_size": 32, "num_layers": 1,
                  "num_heads": 2}, "objective": {"name": "causal_lm"}, "batch": {"global_batch_size": 4},
        "data": {"source": {"kind": "needle", "vocab_size": 300, "ctx_chunk_len": 16, "needle_len": 4,
                            "needle_marker": "key", "needle_test_examples": 6}}})
    folder, _ = checkpointed(config)
    rows = [{"step": 10, "loss": 5.5, "time/step": 1.0, "tokens_per_second": 100.0, "ridge/pairs": 512},
            {"step": 10, "val/loss": 5.6, "val/needle_hit_rate": 0.25, "val/needle_hit_rate/low": 0.2,
             "val/needle_hit_rate/high": 0.3, "val/phase_coherence": 0.5, "val/entropy_flow": None},
            {"step": 20, "loss": 5.25, "time/step": 2.0, "tokens_per_second": 300.0},
            {"step": 20, "val/loss": 5.4, "val/needle_hit_rate": 0.5, "val/needle_hit_rate/low": 0.4,
             "val/needle_hit_rate/high": 0.6}]
    folder.metrics_jsonl.write_text("".join(json.dumps({"fence": 1, **row}) + "\n" for row in rows))
    folder.log_file.write_text("x INFO [DIAG:C2] collapse | look\nx INFO [DIAG:C2] collapse | look\nother\n")
    return folder


def test_every_key_of_the_specification_is_there(needle_run):
    found = summary(needle_run)
    assert set(KEYS) <= set(found)
    assert (found["task"], found["preset"], found["seed"], found["steps"]) == ("needle", "needles", 41, 20)
    assert (found["train_loss"], found["val_loss"], found["world_size"]) == (5.25, 5.4, 1)
    assert (found["needle_hit_rate"], found["needle_hit_rate_ci"], found["needle_split"]) == (0.5, [0.4, 0.6], "val")
    assert found["phase_coherence"] == 0.5
    assert found["ridge"] == {"pairs": 512}
    assert found["nulls"]["needle_bag"] == 0.25
    assert found["diagnostics"] == ["[DIAG:C2] collapse | look"]
    assert found["timing"] == {"step": 3.0, "tokens_per_second": 300.0}
    assert found["reasons"]["test_ppl"] == "not measured in this run"
    assert "needle_hit_rate" not in found["reasons"]


def test_an_evaluation_afterwards_speaks_for_the_run(needle_run):
    results = evaluate_needle(open_target(str(needle_run.root)), Request(controls=True), ["pretrain"])
    results.write(needle_run.eval_dir / "needles")
    found = json.loads(write_summary(needle_run.root).read_text())
    assert found["needle_split"] == "test"
    assert found["needle_hit_rate"] == results.metrics["test/needle_hit_rate"].value
    assert set(found["controls"]) == {"shuffled_needle", "permuted_needle", "query_removed", "wrong_key"}
    assert set(found["controls"]["wrong_key"]) == {"rate", "ci", "n"}
    assert found["verdict"]["outcome"] == "no retrieval"


def test_what_is_not_finite_is_null_with_its_reason(needle_run):
    with needle_run.metrics_jsonl.open("a") as file:
        file.write(json.dumps({"fence": 1, "step": 30, "loss": None, "loss_nonfinite": "nan"}) + "\n")
    text = write_summary(needle_run.root).read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["train_loss"] is None
    assert found["reasons"]["train_loss"] == "nan"
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in found.values())
