"""`pretrain eval --task needle`: controls, checks, distance and verdict on models whose answers are known."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from needle_models import Constant, Echo, Oracle
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation import needle_eval
from evaluation.needle_controls import applicable, permuted_needle, query_removed, shuffled_needle, wrong_key
from evaluation.needle_eval import evaluate_needle, needle_task
from evaluation.needle_tables import needle_section, needle_tables
from evaluation.offline import Request, default_folder
from evaluation.results import Results
from evaluation.target import open_target
from pretrain.cli.main import main
from pretrain.config.needle import NeedleConfig
from pretrain.config.run import RunConfig
from pretrain.data.needle import NeedleSource
from pretrain.errors import UserError

TASK = {"kind": "needle", "vocab_size": 400, "ctx_chunk_len": 16, "needle_len": 4, "needle_marker": "key",
        "needle_test_examples": 220}
SWITCHES = {"memory_zero": "", "readout_off": ""}


def config(tmp_path, **source) -> RunConfig:
    return RunConfig.model_validate({
        "name": "needles", "runs_dir": str(tmp_path),
        "model": {"family": "baseline", "body": "llama", "vocab_size": 400, "hidden_size": 32, "num_layers": 1,
                  "num_heads": 2, "max_position_embeddings": 128},
        "objective": {"name": "causal_lm"}, "batch": {"global_batch_size": 4},
        "data": {"source": {**TASK, **source}}})


@pytest.fixture
def opened(tmp_path, monkeypatch, checkpointed):
    """`opened(module)`: a run of a tiny Llama whose forward is another model's."""
    folder, _ = checkpointed(config(tmp_path))
    monkeypatch.setattr(needle_eval, "reads_out", lambda config: True)

    def of(module, **source):
        module.evaluation_controls = SWITCHES
        target = open_target(str(folder.root))
        data = target.config.data
        own = data.model_copy(update={"source": NeedleConfig.model_validate({**TASK, **source})})
        return replace(target, model=module, module=module, config=target.config.model_copy(update={"data": own}))
    return of


def evaluated(target, **request) -> Results:
    results = evaluate_needle(target, Request(batch_size=64, **request), ["pretrain", "eval"])
    return Results.model_validate_json(results.model_dump_json())


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_an_oracle_is_believed_only_with_its_controls_and_a_null(opened, monkeypatch):
    oracle = opened(Oracle(400))
    plain = evaluated(oracle)
    assert plain.metrics["test/needle_hit_rate"].value == 1.0
    assert plain.details["verdict"]["outcome"] == "undecided"
    assert "--controls" in plain.details["verdict"]["words"]
    results = evaluated(oracle, controls=True)
    rows = by_name(results.details["controls"])
    assert {name: (row["passed"], row["expected"]) for name, row in rows.items()} == {
        "shuffled_needle": (True, "uniform"), "permuted_needle": (True, "needle_bag"),
        "query_removed": (True, "context_bag"), "wrong_key": (True, "context_bag"),
        "memory_zero": (True, "uniform"), "readout_off": (None, "reported")}
    assert 0.05 < rows["permuted_needle"]["value"] < 0.25
    assert rows["permuted_needle"]["n"] == 200 * 4
    assert all(check["passed"] for check in results.details["checks"])
    assert "--null RUN" in results.details["verdict"]["words"]
    assert results.passed is None
    assert {row["value"] for row in results.details["distance"]} == {1.0}
    assert (results.details["distance"][0]["low"], results.details["distance"][-1]["high"]) == (6, 62)
    monkeypatch.setattr(needle_eval, "open_target", lambda *a, **k: opened(Constant(400)))
    claimed = evaluated(oracle, controls=True, null="runs/null")
    assert claimed.details["verdict"]["outcome"] == "retrieval"
    assert claimed.details["controls"][0]["name"] == "null_adapter"
    assert claimed.metrics["test/control/shuffled_needle"].value == rows["shuffled_needle"]["value"]


def test_an_echo_is_no_retrieval(opened):
    results = evaluated(opened(Echo(400)), controls=True)
    assert results.metrics["test/needle_echo_rate"].value == 1.0
    assert results.details["verdict"]["outcome"] == "no retrieval"
    assert any(text.startswith("[DIAG:H3]") for text in results.details["findings"])


def test_a_model_that_knows_the_answer_without_the_context_is_a_leak(opened):
    class Cheats(Oracle):
        """Has seen all test needles: it answers from the key alone."""

        def answer(self, row, place, controls):
            known = getattr(self, "known", None)
            if known is None:
                rows = NeedleSource(NeedleConfig.model_validate({**TASK, "split": "test"})).rows(np.arange(220))
                self.known = known = {tuple(t[66:70]): n for t, n in zip(rows.tokens, rows.needle, strict=True)}
            needle = known.get(tuple(row[66:70].tolist()))
            return 0 if needle is None or place < 69 else int(needle[place - 69])

    results = evaluated(opened(Cheats(400)), controls=True)
    assert results.details["verdict"]["outcome"] == "leak"
    assert results.passed is False
    assert results.failure == "a leak: shuffled_needle, permuted_needle, memory_zero"
    assert any(text.startswith("[DIAG:H1] the needle is still found") for text in results.details["findings"])


def test_a_model_that_looks_ahead_fails_the_check(opened):
    class Peeks(Oracle):
        def answer(self, row, place, controls):
            return int(row[min(place + 1, len(row) - 1)])

    results = evaluated(opened(Peeks(400)), controls=True, max_windows=8)
    checks = by_name(results.details["checks"])
    assert not checks["future_perturbation"]["passed"]
    assert "future_perturbation" in results.failure


def test_controls_change_what_they_say_and_nothing_else():
    source = NeedleSource(NeedleConfig.model_validate({**TASK, "split": "test"}))
    ids = np.arange(50)
    rows, task = source.rows(ids), source.config
    places = rows.start[:, None] + np.arange(4)
    at = {name: change(rows, task, ids) for name, change in (("shuffled", shuffled_needle), (
        "permuted", permuted_needle), ("removed", query_removed), ("wrong", wrong_key))}
    inside = {name: np.take_along_axis(tokens, places, 1) for name, tokens in at.items()}
    assert not (inside["shuffled"][:, :, None] == rows.needle[:, None, :]).any()
    assert (np.sort(inside["permuted"]) == np.sort(rows.needle)).all()
    assert (inside["permuted"] != rows.needle).any(axis=1).mean() > 0.8
    changed = {name: (tokens != rows.tokens).any(axis=0) for name, tokens in at.items()}
    assert not changed["shuffled"][64:].any()
    assert not changed["permuted"][64:].any()
    assert set(np.flatnonzero(changed["removed"])) == {66, 67, 68, 69}
    assert set(np.flatnonzero(changed["wrong"])) == {66, 67, 68, 69}
    assert (at["removed"][:, 64:70] == task.query_ids).all()
    assert not (at["wrong"][:, 66:70, None] == rows.tokens[:, None, 66:70]).any()


@pytest.mark.parametrize("marker, needles, expected", [
    ("none", 1, {"query_removed": "reported"}), ("tag", 1, {"query_removed": "reported"}),
    ("key", 1, {"query_removed": "context_bag", "wrong_key": "context_bag"}),
    ("tagkey", 1, {"query_removed": "reported", "wrong_key": "reported"}),
    ("tagkey", 2, {"query_removed": "context_bag", "wrong_key": "context_bag"})])
def test_a_control_has_a_bound_only_where_the_query_says_what_is_wanted(marker, needles, expected):
    task = NeedleConfig(vocab_size=400, ctx_chunk_len=16, needle_len=4, needle_marker=marker, needles=needles)
    found = {c.name: c.expected for c in applicable(task, {})}
    assert found == {"shuffled_needle": "uniform", "permuted_needle": "needle_bag", **expected}


def test_the_task_can_be_changed_and_must_fit(opened):
    target = opened(Oracle(400))
    assert needle_task(target, "val", ["data.source.needle_len=8"]).needle_len == 8
    for sets, message in ((["model.x=1"], "here only the task is changed"),
                          (["data.source.needle_len=900"], "needle_len"),
                          (["data.source.ctx_chunks=9"], "154 tokens are more than the 128"),
                          (["data.source.vocab_size=500"], "the model knows 400 ids"),
                          (["data.source.needle_query=false"], "has no query")):
        with pytest.raises(UserError, match=message) as caught:
            needle_task(target, "val", sets)
        assert "\n" not in str(caught.value)
    results = evaluated(target, sets=("data.source.needle_len=8",), max_windows=20, split="val")
    assert results.metrics["val/needle_hit_rate"].n == 160
    folder = default_folder(target, Request(sets=("data.source.needle_len=8",)), results)
    assert folder.name == "step-3-needle-val-fp32-needle_len=8"


def test_tables_and_report_show_controls_and_verdict(opened):
    results = evaluated(opened(Oracle(400)), controls=True)
    from rich.console import Console
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in needle_tables(results):
        console.print(part)
    text = console.export_text()
    for word in ("shuffled_needle", "as expected", "uniform", "0.5000%", "hit rate by distance", "Undecided",
                 "future_perturbation: passed"):
        assert word in text, word
    page = needle_section([results])
    assert "<svg" in page
    assert "shuffled_needle" in page
    assert needle_section([]) == ""


def test_the_command_on_a_run_and_on_a_config(tmp_path, monkeypatch, capsys, checkpointed):
    folder, _ = checkpointed(config(tmp_path, needle_test_examples=8))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain", "eval", *map(str, words), "--task", "needle"])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err
    code, out, err = command(folder.root, "--controls", "--json")
    assert code == 0, err
    stated = json.loads(out)
    assert stated["details"]["verdict"]["outcome"] == "no retrieval"
    assert (folder.eval_dir / "step-3-needle-test-fp32-controls" / "results.json").is_file()
    code, out, err = command(folder.config_file, "--set", "data.source.needle_test_examples=4", "--json")
    stated = json.loads(out)
    assert (code, stated["step"], stated["details"]["examples"]) == (0, 0, 4)
    code, out, _ = command(folder.root)
    assert code == 0
    assert "test/needle_hit_rate" in out
    assert "No retrieval" in out
    code, _, err = command(tmp_path / "nothing")
    assert (code, err.count("\n")) == (2, 1)


def test_a_plain_transformers_model_is_asked_the_default_task_on_its_vocabulary(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=128))
    model.save_pretrained(tmp_path / "plain")
    target = open_target(str(tmp_path / "plain"))
    changes = ("data.source.ctx_chunk_len=16", "data.source.needle_len=4", "data.source.needle_marker=key")
    results = evaluated(target, sets=changes, max_windows=10, controls=True)
    assert results.details["task"]["vocab_size"] == 400
    assert results.metrics["test/needle_hit_rate"].n == 40
    assert results.details["references"] == []
    assert results.details["findings"] == [], "rules need the config of a run"
    with pytest.raises(UserError, match="534 tokens are more than the 128"):
        evaluated(target)
