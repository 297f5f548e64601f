"""The needle evaluation on models whose answers are known, on one rank and on two."""

import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needle_models import Constant, Echo, Oracle

from evaluation.needle import Answers, NeedleEvaluator, ask, figures, headlines, nulls
from evaluation.needle_reader import Reader, ranks, reads_out
from pretrain.config.needle import NeedleConfig
from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.data.needle import NeedleSource
from pretrain.data.open import eval_batches
from pretrain.metrics.needle import needle_rates
from pretrain.models.base import BuildContext

TASK = {"kind": "needle", "vocab_size": 300, "ctx_chunk_len": 16, "needle_len": 4, "needle_marker": "key",
        "needle_eval_examples": 40}
VAL = NeedleSource(NeedleConfig.model_validate({**TASK, "split": "val"}))
CPU = torch.device("cpu")


def answers(model, *, readout=True, source=VAL, batch=8) -> Answers:
    reader = Reader(model, CPU, readout)
    with torch.no_grad():
        return Answers.of(ask(reader, eval_batches(source, rank=0, world=1, batch_size=batch), source.config))


def rates(model, **options) -> dict[str, float]:
    return {name: rate.value for name, rate in needle_rates(answers(model, **options).predictions, 5).items()}


def run_config(tmp_path, **source) -> RunConfig:
    return RunConfig.model_validate({
        "name": "needles", "runs_dir": str(tmp_path),
        "model": {"family": "baseline", "body": "llama", "vocab_size": 300, "hidden_size": 32, "num_layers": 1,
                  "num_heads": 2}, "objective": {"name": "causal_lm"}, "batch": {"global_batch_size": 6},
        "data": {"source": {**TASK, **source}}})


def view(config, model, rank=0, world=1, reduce=lambda tensor: tensor, step=0):
    def forward(controls=None, **inputs):
        return model(**inputs, controls=controls or {})
    return SimpleNamespace(config=config, step=step, rank=rank, world=world, device=CPU, forward=forward,
                           all_reduce=reduce)


@pytest.mark.parametrize("readout", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_a_planted_oracle_scores_100_percent(readout, cached):
    found = rates(Oracle(300, cached=cached), readout=readout)
    assert {name: found[name] for name in ("needle_hit_rate", "needle_hit_rate_tf", "needle_hit_rate_topk",
                                           "needle_exact_match", "needle_bag_rate")} == dict.fromkeys(
        ("needle_hit_rate", "needle_hit_rate_tf", "needle_hit_rate_topk", "needle_exact_match", "needle_bag_rate"), 1.0)
    assert found["needle_echo_rate"] == found["echo_rate_haystack"] == 0.0


def test_an_echo_is_100_percent_of_the_original_s_metric_and_nothing_of_ours():
    found = rates(Echo(300))
    assert found["needle_echo_rate"] == found["echo_rate_haystack"] == 1.0
    assert found["needle_hit_rate"] == found["needle_hit_rate_tf"] == found["needle_exact_match"] == 0.0


def test_equal_logits_are_no_hit():
    """A model that knows nothing has not every answer among its first five."""
    found = rates(Constant(300))
    assert found["needle_hit_rate_topk"] == found["needle_hit_rate_tf"] == 0.0
    logits = torch.zeros(1, 1, 5)
    assert [int(ranks(logits, torch.tensor([[place]]))) for place in range(5)] == [0, 1, 2, 3, 4]
    assert int(logits[0, 0].argmax()) == 0


def test_what_the_model_feeds_itself_decides_free_running():
    """An oracle that errs once is lost from there on; fed the right tokens it errs once."""
    class Stumbles(Oracle):
        def answer(self, row, place, controls):
            return 0 if place == VAL.config.retrieval_start else super().answer(row, place, controls)

    found = rates(Stumbles(300))
    assert found["needle_hit_rate"] == 0.25
    assert found["needle_hit_rate_tf"] == 0.75


def test_the_prefix_is_fed_once_and_then_token_by_token():
    model = Oracle(300)
    Reader(model, CPU, True).free(VAL.get(np.arange(3))["input_ids"][:, :70], 4, 300)
    assert [call["length"] for call in model.calls] == [70, 1, 1, 1]


def test_answers_do_not_depend_on_batches_or_ranks(tmp_path):
    whole = answers(Oracle(300))
    for size in (3, 40, 64):
        other = answers(Oracle(300), batch=size)
        assert np.array_equal(whole.predictions.free, other.predictions.free)
        assert np.allclose(whole.nll, other.nll)
    config = run_config(tmp_path)
    alone = NeedleEvaluator(None).evaluate(view(config, Oracle(300)))
    barrier, tensors, results = threading.Barrier(2, timeout=60), {}, {}

    def reduce(rank):
        def summed(tensor):
            tensors[rank] = tensor.clone()
            barrier.wait()
            return tensors[0] + tensors[1]
        return summed

    def work(rank):
        results[rank] = NeedleEvaluator(None).evaluate(view(config, Oracle(300), rank, 2, reduce(rank)))
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results[0] == results[1] == alone


def test_figures_hold_every_metric_with_an_interval(tmp_path):
    result = figures(answers(Oracle(300)), VAL.config)
    assert set(result.metrics) == {f"val/{name}" for name in (
        "needle_hit_rate", "needle_hit_rate_tf", "needle_hit_rate_topk", "avg_correct_tokens_per_needle",
        "needle_exact_match", "needle_partial_success_rate", "needle_bag_rate", "needle_echo_rate",
        "echo_rate_haystack", "loss")}
    assert all(metric.ci is not None for metric in result.metrics.values())
    assert result.metrics["val/avg_correct_tokens_per_needle"].value == 4.0
    assert result.metrics["val/needle_hit_rate"].n == 160
    assert result.metrics["val/needle_exact_match"].n == 40
    assert not result.metrics["val/needle_echo_rate"].higher_is_better
    assert nulls(VAL.config).needle_bag == 0.25


def test_the_log_has_the_lines_people_look_for(tmp_path, caplog):
    config = run_config(tmp_path)
    with caplog.at_level(logging.INFO, "pretrain"):
        NeedleEvaluator(None).evaluate(view(config, Oracle(300), step=600))
    assert "[NEEDLE-EVAL] Exact hit rate: 1.000 (160/160)" in caplog.messages
    assert "[NEEDLE-EVAL] Top-5 hit rate: 1.000 (160/160)" in caplog.messages
    assert any(message.startswith("[DIAG:H1] hit rate 100.0% is above 20 %") and " | " in message
               for message in caplog.messages)
    assert headlines(needle_rates(answers(Echo(300)).predictions, 5), VAL.config)[-1] == (
        "[NEEDLE-EVAL] Echo rate: 1.000 (160/160)")


def test_the_echo_is_read_without_the_readout():
    model = Oracle(300)
    answers(model)
    off = [call for call in model.calls if call["controls"].get("readout_off")]
    assert off
    assert {call["length"] for call in off} == {64}
    model = Oracle(300)
    answers(model, readout=False)
    assert not any(call["controls"] for call in model.calls), "families without a readout know no such control"


def test_max_batches_takes_fewer_examples_and_no_query_leaves_the_echo(tmp_path):
    fewer = NeedleEvaluator(None, max_batches=2).evaluate(view(run_config(tmp_path), Oracle(300)))
    assert fewer.metrics["val/needle_hit_rate"].n == 12 * 4
    plain = NeedleEvaluator(None).evaluate(view(run_config(tmp_path, needle_query=False), Echo(300)))
    assert {name: metric.value for name, metric in plain.metrics.items()} == {
        "val/needle_echo_rate": 1.0, "val/echo_rate_haystack": 1.0}


def test_a_baseline_is_asked_like_any_other_model(tmp_path):
    config = run_config(tmp_path)
    family = resolve(FAMILIES, "baseline", "model.family")
    model = family.build(config.model, BuildContext(seed=0)).eval()
    assert not reads_out(config)
    few = NeedleSource(VAL.config.model_copy(update={"needle_eval_examples": 5}))
    found = answers(model, readout=False, source=few)
    tokens = few.get(np.arange(5))["input_ids"]
    with torch.no_grad():
        logits = model(tokens, return_logits=True).logits
    forced = logits[:, -4:].argmax(-1).numpy()
    assert ((found.predictions.forced_rank == 0) == (forced == found.predictions.needle)).all()
    assert (found.predictions.free[:, 0] == forced[:, 0]).all()
    text = tokens[:, :70]
    for _ in range(4):
        with torch.no_grad():
            text = torch.cat([text, model(text, return_logits=True).logits[:, -1:].argmax(-1)], dim=1)
    assert (text[:, 70:].numpy() == found.predictions.free).all()
    with torch.no_grad():
        loss = model(tokens, few.get(np.arange(5))["labels"])
    assert found.nll.sum() == pytest.approx(float(loss.nll_sum), rel=1e-5)
