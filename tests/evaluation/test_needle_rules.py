"""Each rule fires on figures that call for it, and is silent on healthy ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.needle_rules import Evidence, findings, line
from pretrain.config.needle import NeedleConfig
from pretrain.metrics.needle import Nulls, Rate

NULLS = Nulls.of(pool_size=31800, context_len=512, needle_len=16)


def rate(hits: int, examples: int = 200) -> Rate:
    outcomes = np.zeros((examples, 16), bool)
    outcomes.ravel()[np.linspace(0, outcomes.size - 1, hits).astype(int)] = True
    return Rate.of(outcomes)


def evidence(hits=1600, *, echo=0, step=2000, rows=(), val_loss=10.4, controlled=False, failed=None, model=None,
             **task) -> Evidence:
    config = SimpleNamespace(model=SimpleNamespace(**(model or {})), objective=SimpleNamespace(infonce_negatives=128),
                             batch=SimpleNamespace(global_batch_size=4))
    return Evidence(step, {"needle_hit_rate": rate(hits), "needle_echo_rate": rate(echo)}, NULLS,
                    NeedleConfig(**{"needle_marker": "key", **task}), config, val_loss, rows, controlled, failed or {})


def fired(found: Evidence) -> list[str]:
    return [finding.rule for finding in findings(found)]


def rows(key: str, values, every: int = 10) -> list[dict]:
    return [{"step": (i + 1) * every, key: float(value)} for i, value in enumerate(values)]


HEALTHY = {"controlled": True}


def test_a_healthy_run_has_no_findings():
    training = rows("lm_loss", np.linspace(10.4, 9.8, 200)) + rows("infonce_loss", np.linspace(4.86, 1.0, 200))
    assert fired(evidence(3100, rows=training, val_loss=10.2, **HEALTHY)) == []


def test_chance_after_500_steps_names_causes_and_cures_in_order():
    model = {"kiss_ridge_calib": False, "enable_pvm": True, "readout_from": "none", "pvm_beta": 0.85}
    found = findings(evidence(0, model=model, needle_marker="none"))
    assert [f.rule for f in found] == ["H0"]
    message = found[0].message
    order = ["not calibrated", "no memory is read out", "only 2000 steps", "0.85^134 = 3.5e-10", "1 of 241"]
    assert [message.index(part) for part in order] == sorted(message.index(part) for part in order)
    assert "0.9830" in found[0].remedy
    assert line(found[0]) == f"[DIAG:H0] {message} | {found[0].remedy}"
    assert fired(evidence(0, step=499)) == []
    assert "rules retrieval out" in findings(evidence(0, step=9000))[0].message
    assert "alike (0.998" in findings(evidence(0, rows=rows("val/readout_entropy", [0.9, 0.998])))[0].message


def test_updates_that_were_skipped_and_a_loss_that_doubles_are_told():
    calm = rows("loss", [10.0, 9.9, 9.8, 9.7, 9.6, 9.5, 18.0])
    assert fired(evidence(rows=calm, **HEALTHY)) == []
    assert fired(evidence(rows=[*calm, {"step": 80, "loss": 19.5}], **HEALTHY)) == ["D1"]
    found = findings(evidence(rows=rows("skipped", [0, 0, 2]), **HEALTHY))
    assert [f.rule for f in found] == ["D1"] and found[0].message.startswith("2 updates")


def test_a_high_rate_asks_for_controls_and_controls_that_do_not_drop_are_a_leak():
    assert fired(evidence(700)) == ["H1"]
    assert fired(evidence(600)) == []
    assert fired(evidence(3100, **HEALTHY)) == []
    leak = findings(evidence(3100, controlled=True, failed={"wrong_key": 0.0125}))
    assert [f.rule for f in leak] == ["H1"]
    assert "wrong_key 1.2%" in leak[0].message


def test_a_model_without_memory_and_attention_above_chance_is_a_leak():
    blind = {"n_afrb": 0, "disable_attn": True}
    assert fired(evidence(3, step=0, model=blind)) == ["H2"]
    assert fired(evidence(2, step=0, model=blind)) == []
    assert "H2" not in fired(evidence(600, model={"n_afrb": 0, "disable_attn": False}))
    assert "H2" not in fired(evidence(600, model={**blind, "enable_pvm": True}))


@pytest.mark.parametrize("hits, echo, expected", [(100, 1000, ["H3"]), (100, 999, []), (0, 3, ["H3"]), (0, 2, [])])
def test_an_echo_of_ten_times_the_rate(hits, echo, expected):
    assert fired(evidence(hits, echo=echo, step=100)) == expected


def test_infonce_above_chance_or_rising():
    assert fired(evidence(rows=rows("infonce_loss", [9.0] * 40), **HEALTHY)) == ["N1"]
    assert fired(evidence(rows=rows("infonce_loss", [9.0] * 29), **HEALTHY)) == []
    assert fired(evidence(rows=rows("infonce_loss", np.linspace(1, 4, 60)), **HEALTHY)) == ["N1"]
    assert fired(evidence(rows=rows("infonce_loss", np.linspace(4, 1, 60)), **HEALTHY)) == []


def test_memorisation_by_its_gap_and_by_its_staircase():
    assert fired(evidence(rows=rows("lm_loss", [5.0] * 50), val_loss=6.1, **HEALTHY)) == ["O1"]
    assert fired(evidence(rows=rows("lm_loss", [5.0] * 50), val_loss=5.9, **HEALTHY)) == []
    stairs = rows("lm_loss", [10 - 0.4 * (step // 250) + 0.01 * (step % 3) for step in range(10, 2000, 10)])
    assert fired(evidence(rows=stairs, val_loss=7.5, needle_train_size=1000, **HEALTHY)) == ["O1"]
    assert fired(evidence(rows=stairs, val_loss=7.5, needle_train_size=0, **HEALTHY)) == []
    elsewhere = rows("lm_loss", [10 - 0.4 * ((step + 125) // 250) + 0.01 * (step % 3) for step in range(10, 2000, 10)])
    assert fired(evidence(rows=elsewhere, val_loss=7.5, needle_train_size=1000, **HEALTHY)) == []
