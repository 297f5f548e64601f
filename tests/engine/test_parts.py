"""Parts of the engine that need no process group: schedules, state, random numbers, DeepSpeed dict, requests."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import deepspeed_keys
from pretrain.config.deepspeed import deepspeed_config
from pretrain.config.load import load_run_config
from pretrain.config.presets import configs_dir
from pretrain.config.run import ScheduleConfig
from pretrain.engine import claim as claims
from pretrain.engine import rng
from pretrain.engine.probe import require_finite
from pretrain.engine.schedule import LearningRate
from pretrain.engine.state import RunState
from pretrain.engine.traps import remove_stale_locks
from pretrain.errors import ConfigError, Divergence
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import live_holder

SMALL = {"model": {"family": "baseline"}, "objective": {"name": "causal_lm"},
         "data": {"source": {"kind": "synthetic", "vocab_size": 64, "samples": 64}}}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("planted", [float("nan"), float("inf"), -float("inf"), None])
def test_weights_that_no_figure_shows_are_looked_at_before_a_save(stage: int, dtype: torch.dtype,
                                                                  planted: float | None) -> None:
    """Every weight is some rank's to look at; what fills up a partition is none."""
    model = torch.nn.Linear(4, 3).to(dtype)
    told = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, agree=bool, gather_objects=lambda found: [found])
        for parameter in model.parameters():
            whole = parameter.detach().clone().flatten()
            if planted is not None and parameter.ndim == 2:
                whole[-1] = planted
            parts = torch.full((2 * -(-len(whole) // 2),), float("nan"), dtype=dtype)
            parts[:len(whole)] = whole
            parameter.ds_tensor, parameter.ds_numel = parts.chunk(2)[rank], len(whole)  # type: ignore[attr-defined]
            if stage == 2:
                parameter.data = whole.view_as(parameter)
        try:
            require_finite(SimpleNamespace(world=world, model=model, stage=stage), {"nll": 1.0}, 7)  # type: ignore[arg-type]
        except Divergence as error:
            told.append((str(error).split(";")[0], error.agreed))
    assert told == ([] if planted is None else [(f"step 7: not finite: weights of rank {stage - 2}", True)])


def schedule(name: str, *, warmup: int = 5, total: int = 100, decay: int = 10, **fields: object) -> LearningRate:
    return LearningRate(ScheduleConfig(name=name, **fields), warmup_steps=warmup, decay_steps=decay, total_steps=total)


@given(name=st.sampled_from(["cosine", "linear", "wsd", "constant"]), warmup=st.integers(0, 120),
       total=st.integers(1, 200), low=st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_schedule_rises_to_the_peak_then_never_rises_again(name: str, warmup: int, total: int, low: float) -> None:
    lr = schedule(name, warmup=warmup, total=total, min_lr_ratio=low)
    factors = [lr.factor(step) for step in range(total)]
    rise, fall = factors[:lr.warmup], factors[max(0, lr.warmup - 1):]
    assert all(a < b for a, b in itertools.pairwise(rise))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fall))
    assert 0 < max(factors) <= 1
    assert min(fall) >= min(low, 1) - 1e-12


def test_the_last_update_has_the_lowest_rate() -> None:
    assert schedule("cosine", min_lr_ratio=0.1).factor(99) == pytest.approx(0.1)
    assert schedule("linear", min_lr_ratio=0.1).factor(99) == pytest.approx(0.1)
    assert schedule("wsd", warmup=0, total=1, min_lr_ratio=0.0).factor(0) == 1.0
    wsd = schedule("wsd", min_lr_ratio=0.0)
    assert wsd.factor(89) == 1.0
    assert wsd.factor(90) == pytest.approx(0.9)
    assert wsd.factor(99) == pytest.approx(0.0)


def test_warmup_counts_updates_from_one() -> None:
    assert [schedule("constant").factor(s) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_plateau_remembers_through_a_restart() -> None:
    one = schedule("plateau", warmup=0, plateau_patience=2, plateau_factor=0.5)
    cuts = [one.observe(v) for v in (3.0, 2.0, 2.0)]
    other = schedule("plateau", warmup=0, plateau_patience=2, plateau_factor=0.5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [*cuts, other.observe(2.5), other.observe(1.0)] == [False, False, False, True, False]
    assert other.factor(0) == 0.5


def test_patience_asks_for_a_least_gain_and_counts_from_where_it_is_told():
    state = RunState()
    seen = []
    for step, value in enumerate((0.50, 0.5005, 0.5009, 0.5025, 0.5024, float("nan"))):
        state.step = step
        best = state.observe(value, higher_is_better=True, least_gain=0.001)
        seen.append((best, state.evaluations_without_improvement))
    # 0.5009 is no more than 0.001 above 0.50; small gains add up until they are.
    assert seen == [(True, 0), (True, 1), (True, 2), (True, 0), (False, 1), (False, 2)]
    assert (state.best, state.best_steps, state.patience_best) == (0.5025, [0, 1, 2, 3], 0.5025)
    assert not state.observe(0.4, higher_is_better=True, counts=False)
    assert state.evaluations_without_improvement == 2
    older = RunState.from_json({"best": 0.5, "best_steps": [3]})
    assert not older.observe(0.4, higher_is_better=True) and older.evaluations_without_improvement == 1


def test_state_survives_json_and_counts_evaluations() -> None:
    state = RunState(k=9, step=7)
    seen = [state.observe(v, higher_is_better=False) for v in (3.0, 3.5, 2.0, float("nan"))]
    assert seen == [True, False, True, False]
    again = RunState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert (again.best, again.evaluations_without_improvement) == (2.0, 1)


def test_random_numbers_go_on_where_they_were_captured() -> None:
    rng.seed_all(3, rank=1)
    np.random.standard_normal(3)
    random.gauss(0, 1)
    state = rng.capture()

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(1))]
    first = draw()
    rng.restore(state)
    assert draw() == first
    with rng.preserved():
        draw()
    rng.restore(state)
    assert draw() == first


def test_ranks_draw_different_numbers() -> None:
    drawn = []
    for rank in (0, 1):
        rng.seed_all(3, rank)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("extra,key,ours", [
    ({"train_batch_size": 3}, "train_batch_size", "batch.global_batch_size"),
    ({"bf16": {"enabled": True}}, "bf16", "engine.precision"),
    ({"optimizer": {"type": "Lion"}}, "optimizer", "optim"),
    ({"gradient_clipping": 2.0}, "gradient_clipping", "optim.grad_clip"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "engine.zero_stage"),
    ({"wall_clock_breakdwn": True}, "wall_clock_breakdwn", 'did you mean "wall_clock_breakdown"'),
    ({"zero_optimization": {"reduce_bucket_sise": 3}}, "zero_optimization.reduce_bucket_sise",
     'did you mean "reduce_bucket_size"'),
])
def test_a_deepspeed_key_that_is_ours_or_nobodys_is_refused(tmp_path, extra, key, ours) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "engine": {"deepspeed": extra}}))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert f"engine.deepspeed.{key}" in str(caught.value)
    assert ours in str(caught.value)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_deepspeed_itself_knows_every_key_that_may_be_set(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    fields = DeepSpeedZeroConfig.model_fields
    names = {field.alias or key for key, field in fields.items()} | set(fields)
    assert names >= deepspeed_keys._ZERO
    written = json.loads((configs_dir() / "deepspeed" / f"{name}.json").read_text())
    assert set(written["zero_optimization"]) - {"stage"} <= deepspeed_keys._ZERO
    assert set(written) <= deepspeed_keys._TOP | set(deepspeed_keys.OWNED)


def test_further_deepspeed_keys_are_laid_over(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "engine": {"deepspeed": {
        "wall_clock_breakdown": True, "zero_optimization": {"round_robin_gradients": True}}}}))
    config = load_run_config(path).config
    ds = deepspeed_config(config, config.batch.resolve(1), "bf16", on_cuda=True)
    assert ds["wall_clock_breakdown"] is True
    assert ds["zero_optimization"]["round_robin_gradients"] is True
    assert ds["zero_optimization"]["overlap_comm"] is True
    assert ds["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_deepspeed_files_say_what_they_are(name: str) -> None:
    config = json.loads((configs_dir() / "deepspeed" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == ("offload" in name)
    assert ("offload_param" in zero) == (name == "zero3-offload")


def test_a_claim_is_known_before_its_checkpoints_are_hashed(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A process that is told to leave while it hashes gives its lease back and leaves a verdict."""
    known: list[claims.Claim] = []

    def told_to_leave(_folder: RunFolder) -> None:
        assert known and known[0].lease is not None and known[0].status is not None
        raise SystemExit(85)

    monkeypatch.setattr(claims, "newest_whole", told_to_leave)
    world = SimpleNamespace(on_main=lambda action: action())
    with pytest.raises(SystemExit):
        claims.claim_run(load_run_config("demo", [f"runs_dir={tmp_path}"]), world, taken=known.append)  # type: ignore[arg-type]
    assert live_holder(known[0].folder) is not None  # until it is given back
    known[0].lease.release()  # type: ignore[union-attr]
    assert live_holder(known[0].folder) is None


def test_stale_compile_locks_are_removed_and_live_ones_stay(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 3600), ("new", 5)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    assert [p.parent.name for p in remove_stale_locks()] == ["old"]
    assert (tmp_path / "new" / "lock").exists()
