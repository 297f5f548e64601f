"""Time and cost, against the same figures worked out by hand; the bytes of collectives are counted elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.cost import Hardware, bill, step_time, traffic
from pretrain.config.gpus import KNOWN, known_gpu
from pretrain.config.load import load_run_config
from pretrain.config.plan import Plan, make_plan
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.monitor.throughput import peak_flops

CARD = Hardware(peak_flops=1e15, efficiency=0.5, link=50e9, memory=2e12, disk=1e9)


def run_of(*sets: str, world: int = 8, precision: Any = "bf16") -> tuple[RunConfig, Plan]:
    config = load_run_config("baseline-1b", ["checkpoint.every=null", "engine.activation_checkpointing=false", *sets])
    return config.config, make_plan(config.config, world, precision=precision, device="cuda")


def sent(*sets: str, world: int = 8, precision: Any = "bf16") -> dict[str, float]:
    config, plan = run_of(*sets, world=world, precision=precision)
    return {part.name: part.bytes for part in traffic(config, plan)}


def test_bytes_of_each_stage() -> None:
    p, ring = 1_040_254_976, 7 / 8  # a batch of 256 = 2 x 16 x 8
    assert sent("engine.zero_stage=0", "engine.precision=fp32", precision="fp32") == {"gradients": 2 * ring * 4 * p}
    assert sent("engine.zero_stage=1", "engine.precision=fp32", precision="fp32") == {
        "gradients": 2 * ring * 4 * p, "weights": ring * 4 * p}
    assert sent("engine.zero_stage=2") == {"gradients": 16 * 2 * ring * 4 * p, "weights": ring * 2 * p}
    gathered = p + (p - 1_000_000_000)
    assert sent("engine.zero_stage=3") == {"gradients": 16 * ring * 4 * p, "weights": 16 * ring * 2 * gathered}
    assert sent("engine.zero_stage=2", world=1) == {}


def test_time_of_a_step_by_hand() -> None:
    config, plan = run_of("engine.zero_stage=2", "batch={global_batch_size: 256, micro_batch_size: 32}")
    assert plan.batch.gradient_accumulation_steps == 1
    step = step_time(config, plan, CARD)
    p, ring = plan.parameters.trainable, 7 / 8
    assert step.compute.seconds == pytest.approx(plan.flops_per_token * 256 * 2048 / (8 * 1e15 * 0.5))
    assert [term.seconds for term in step.communication] == pytest.approx(
        [2 * ring * 4 * p / 50e9, ring * 2 * p / 50e9])
    assert [(term.name, term.seconds) for term in step.others] == [("optimizer", pytest.approx(42 * p / 8 / 2e12))]
    assert step.most == pytest.approx(sum(term.seconds for term in step.terms))
    hidden = max(step.compute.seconds, sum(term.seconds for term in step.communication))
    assert step.least == pytest.approx(hidden + step.others[0].seconds)


def test_recomputing_activations_is_a_forward_more() -> None:
    plain, recomputed = (step_time(*run_of(f"engine.activation_checkpointing={on}"), CARD).compute.seconds
                         for on in ("false", "true"))
    assert recomputed == pytest.approx(4 / 3 * plain)


def test_saves_are_shared_out_over_the_steps_between_them() -> None:
    config, plan = run_of("checkpoint.every=100 steps")
    saves = step_time(config, plan, CARD).others[-1]
    assert (saves.name, saves.seconds) == ("saves", pytest.approx(plan.checkpoint_bytes / 1e9 / 100))
    config, plan = run_of("checkpoint.every=100 steps", "checkpoint.async_save=true")
    assert [term.name for term in step_time(config, plan, CARD).others] == ["optimizer"]


def test_hours_and_cost_are_products() -> None:
    found = bill(steps=7200, seconds_a_step=2.0, world_size=32, price=2.5)
    assert (found.hours, found.device_hours, found.cost) == (4.0, 128.0, 320.0)
    assert bill(7200, 2.0, 32, None).cost is None


def test_more_machines_never_cost_less() -> None:
    """Twice the ranks halve compute and add traffic: device hours rise."""
    hours = []
    for world in (8, 16, 32, 64):
        config, plan = run_of("engine.zero_stage=3", "batch={global_batch_size: 256, micro_batch_size: 2}", world=world)
        hours.append(bill(plan.steps, step_time(config, plan, CARD).most, world, None).device_hours)
    assert hours == sorted(hours)


def test_what_is_not_modelled_is_refused() -> None:
    config, plan = run_of("engine.offload.optimizer=cpu")
    with pytest.raises(UserError, match=r"engine\.offload: .*not modelled"):
        step_time(config, plan, CARD)


def test_every_known_device_has_peaks() -> None:
    for name, card in KNOWN.items():
        assert peak_flops(f"NVIDIA {name}", "bf16"), name
        assert 40e9 <= card.memory_bytes <= 300e9
    with pytest.raises(UserError, match=r'--gpu "H101" is not known \(did you mean "H10'):
        known_gpu("H101")


def test_the_formulas_are_those_of_the_docstring() -> None:
    from pretrain.config import cost
    config, plan = run_of("engine.zero_stage=3", "checkpoint.every=500 steps", world=16)
    shown = {term.name: term.formula for term in step_time(config, plan, CARD).terms}
    assert shown["gradients sent"] == "8 x R 4 P bytes / 50 GB/s"
    assert shown["weights sent"] == "8 x R 2 (P + F) and again what exceeds 1e9 of them bytes / 50 GB/s"
    assert shown["optimizer"] == "42 bytes x P / W / 2,000 GB/s"
    assert cost.__doc__ is not None
    for name in ("compute", "gradients", "weights", "optimizer", "saves"):
        assert f"    {name} " in cost.__doc__
