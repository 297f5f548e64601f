"""The presets of Spectra: sizes, and the step arithmetic of section 8 of its specification."""

from __future__ import annotations

import pytest

from pretrain.config.interval import Interval, Progress
from pretrain.config.load import load_run_config
from pretrain.config.plan import make_plan
from pretrain.config.presets import list_presets
from pretrain.engine.schedule import LearningRate
from pretrain.engine.setup import Lengths
from pretrain.errors import PretrainError
from pretrain.models.spectra.sizes import SIZES
from pretrain.objectives.embedding_terms import temperature

TRIPLETS = 98_000
NAMED = {f"spectra-{size.lower()}": size for size in SIZES}
RATES = {"M300": 2.5e-4, "M456": 2e-4, "M600": 1.8e-4, "M700": 1.5e-4, "M1B": 1e-4}


def lengths(name, ranks):
    config = load_run_config(name).config
    batch = config.batch.resolve(ranks)
    return config, batch, Lengths.of(config, batch, TRIPLETS)


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_has_its_size_rate_and_texts(name):
    config, batch, _ = lengths(name, 1)
    size = NAMED[name]
    assert config.model.size == size
    assert config.optim.lr == RATES[size.removesuffix("-fit")]
    texts = config.data.source
    assert texts.query_length == texts.passage_length == config.data.seq_len == config.model.max_length
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps, texts.negatives_per_query) == (8, 8, 1)
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)


@pytest.mark.parametrize(("ranks", "updates", "warmup"), [(1, 4593, 367), (2, 2296, 183), (8, 574, 45)])
def test_three_epochs_are_so_many_updates_and_the_rate_ends_at_zero(ranks, updates, warmup):
    """Acceptance test 6, schedules by updates of the sharded run: W16 and W17 counted otherwise."""
    config, batch, steps = lengths("spectra-m456", ranks)
    assert batch.global_batch_size == 64 * ranks
    assert (steps.total, steps.warmup) == (updates, warmup) and warmup == int(0.08 * updates)
    rate = LearningRate(config.schedule, warmup_steps=steps.warmup, decay_steps=steps.decay, total_steps=steps.total)
    factors = [rate.factor(step) for step in range(updates)]
    assert factors[warmup - 1] == 1.0 == max(factors) and factors[-1] == pytest.approx(0, abs=1e-12)
    assert temperature(config.objective, updates, updates) == pytest.approx(0.05)


def test_cadences_are_micro_steps_and_fire_at_the_update_at_or_after_each_multiple():
    config, _, steps = lengths("spectra-m456", 1)
    fired = {}
    for step in range(steps.total):
        before, after = (Progress(steps=s, micro_steps=8 * s, samples=64 * s) for s in (step, step + 1))
        due = config.checkpoint.every.due(before, after)
        if due is not None:
            fired[due] = 8 * (step + 1)
    assert fired[500] == 504 and fired[1000] == 1000 and len(fired) == 73
    assert config.eval.every == config.checkpoint.every == Interval(500, "micro_steps")
    assert config.monitor.log_every == Interval(100, "micro_steps")


def test_what_counts_from_micro_step_5000_and_every_sixth_backup_are_set_for_every_number_of_ranks():
    config = load_run_config("spectra-m456", ["checkpoint.mirror.path=there"]).config
    assert config.train.patience_after == config.eval.embedding.health_after == Interval(5000 * 8, "samples")
    assert config.checkpoint.mirror.every == 6
    assert load_run_config("spectra-m456").config.checkpoint.mirror.path is None


@pytest.mark.parametrize("name", ["spectra-m456", "spectra-m456-compat", "spectra-m456-trunk", "spectra-tiny"])
def test_fp16_is_not_offered(name):
    with pytest.raises(PretrainError, match=r"engine\.precision: fp16 is not for model\.family spectra: .*; use bf16"):
        load_run_config(name, ["engine.precision=fp16"])


def test_tokens_of_a_triplet_are_those_of_its_three_texts():
    config = load_run_config("spectra-m456", ["train.length=480000 tokens", "schedule.warmup=1 steps"]).config
    assert config.data.tokens_per_sample == 3 * 160
    plan = make_plan(config, 2, precision="fp32", device="cpu")
    assert (plan.tokens_per_step, plan.steps) == (128 * 480, 7)
    assert Lengths.of(config, plan.batch, None).total == 7
    assert load_run_config("demo").config.data.tokens_per_sample == 256


def test_the_others():
    compat = load_run_config("spectra-m456-compat").config
    assert compat.model.spectral_norm == "sum" and not compat.model.decay_exclude
    assert not compat.objective.gather_negatives and compat.objective.contrastive_batch == "micro_batch"
    trunk, tiny = (load_run_config(f"spectra-{name}").config.model for name in ("tiny-trunk", "tiny"))
    assert trunk.trunk_parameters() == tiny.trunk_parameters() < tiny.parameter_count().total < 10_000_000
    large, whole = (load_run_config(f"spectra-{name}").config.model for name in ("m456-trunk", "m456"))
    assert large.trunk_parameters() == whole.trunk_parameters()
    code = {f"spectra-tiny-code{part}" for part in ("", "-short", "-long")}
    assert {*NAMED, *code, "spectra-tiny", "spectra-tiny-trunk", "spectra-m456-trunk", "spectra-m456-compat"} == {
        name for name in list_presets() if name.startswith("spectra")}
