"""Plans against figures worked out by hand. The toy model: 10 parameters a unit of width, half of them trainable."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.deepspeed import bucket_elements
from pretrain.config.load import load_run_config
from pretrain.config.memory import rank_memory
from pretrain.config.plan import Speed, checkpoint_bytes, largest_micro_batch, make_plan, never_counts, windows
from pretrain.config.run import ResolvedBatch
from pretrain.errors import ConfigError
from tests.presets import presets

M = 1_000_000


def plan_of(path, sets=(), world=2, precision="fp32", device="cpu", **more):
    return make_plan(load_run_config(path, sets).config, world, precision=precision, device=device, **more)


def terms(plan, phase):
    return {term.name: term.bytes for term in plan.memory.phases[phase]}


def test_steps_tokens_epochs_hours_and_flops(base):
    plan = plan_of(base, ["batch={global_batch_size: 24, micro_batch_size: 3}", "data.seq_len=128",
                          "train.length=1M tokens"], world=4, epoch_samples=1000,
                   speed=Speed(tokens_per_second=1000.0))
    assert (plan.batch.micro_batch_size, plan.batch.gradient_accumulation_steps) == (3, 2)
    assert plan.tokens_per_step == 24 * 128 == 3072
    assert plan.steps == 1_000_000 // 3072 == 325
    assert plan.tokens == 325 * 3072
    assert plan.epochs == pytest.approx(325 * 24 / 1000)
    assert plan.hours == pytest.approx(325 * 3072 / 1000 / 3600)
    assert plan.flops_per_token == 3 * 2 * 10 * 16
    assert plan.flops == 325 * 3072 * 960
    by_peak = plan_of(base, world=4, speed=Speed(peak_flops=1e6, mfu=0.5))
    assert by_peak.hours == pytest.approx(by_peak.flops / (4 * 0.5e6) / 3600)
    assert plan_of(base, speed=Speed(peak_flops=1e6)).hours is None


def test_a_length_in_epochs_needs_the_data(base):
    assert plan_of(base, ["train.length=2 epochs", "batch.global_batch_size=10"], epoch_samples=1005).steps == 201
    with pytest.raises(ConfigError, match=r"train\.length: 2 epochs needs the prepared data"):
        plan_of(base, ["train.length=2 epochs"])


@settings(deadline=None, derandomize=True)
@given(tokens=st.integers(0, 400), seq_len=st.integers(1, 40), stride=st.integers(1, 50))
def test_windows_are_as_many_as_can_be_cut(tokens, seq_len, stride):
    assert windows(tokens, seq_len, stride) == sum(
        1 for start in range(0, tokens, stride) if start + seq_len + 1 <= tokens)


def test_memory_of_zero_2_in_fp32_term_by_term(base, monkeypatch):
    big(monkeypatch, trainable=100 * M, frozen=20 * M)
    plan = plan_of(base, ["engine.zero_stage=2", "data.seq_len=100", "batch={micro_batch_size: 2}"], world=4)
    assert terms(plan, "step") == {
        "weights": 480 * M, "master weights": 100 * M, "Adam moments": 200 * M, "gradients": 100 * M,
        "flat gradients": 100 * M, "AdamW temporaries": 200 * M,
        "kept by the allocator": round(1.4 * 200 * 16 * 16) + 70 * M + 2**26}
    assert terms(plan, "backward") == {
        "weights": 480 * M, "master weights": 100 * M, "Adam moments": 200 * M, "gradients": 100 * M,
        "activations": 200 * 16 * 16, "logits and their gradient": 2 * 200 * 100 * 4, "reduce buckets": 200 * M,
        "kept by the allocator": round(0.4 * 200 * 16 * 16) + 70 * M + 2**26}
    assert terms(plan, "build") == {"weights as built": 480 * M, "flat copy of weights": 480 * M,
                                    "kept by the allocator": 70 * M + 2**26}
    assert plan.memory.peak == "step"
    assert plan.memory.device_bytes == sum(terms(plan, "step").values())


@pytest.mark.parametrize("trainable,bucket", [(3, M), (M + 1, M + 2), (M + 2, M + 2), (60 * M + 1, 50 * M)])
def test_the_reduce_bucket_is_even_and_holds_a_small_model(base, monkeypatch, trainable, bucket):
    big(monkeypatch, trainable=trainable, frozen=0)
    assert bucket_elements(load_run_config(base).config) == bucket


def test_memory_of_zero_3_in_bf16_on_a_gpu_with_offload(base, monkeypatch):
    big(monkeypatch, trainable=2000 * M, frozen=0)
    plan = plan_of(base, ["engine.zero_stage=3", "engine.offload.optimizer=cpu"], world=8, precision="bf16",
                   device="cuda")
    held = {"weights": 500 * M, "master weights": 1000 * M, "Adam moments": 2000 * M, "gradients": 1000 * M,
            "reduce bucket": 200 * M}
    assert {name: size for name, size in terms(plan, "backward").items() if name in held} == held
    assert terms(plan, "backward")["gathered weights"] == 2 * 1000 * M
    assert plan.memory.host_bytes == (1000 + 2000 + 1000 + 1000) * M
    assert terms(plan, "build")["weights as built"] == 4 * 2000 * M // 8


@pytest.mark.parametrize(("stage", "precision", "expected"), [
    (0, "fp32", 4 * 100 + 8 * 100 + 4 * 20), (1, "fp32", 4 * 100 + 12 * 100 + 4 * 20),
    (2, "bf16", 2 * 100 + 12 * 100 + 4 * 20), (3, "bf16", 12 * 100 + 4 * 20), (3, "fp32", 12 * 100 + 4 * 20)])
def test_bytes_of_a_checkpoint(base, monkeypatch, stage, precision, expected):
    big(monkeypatch, trainable=100 * M, frozen=20 * M)
    count = load_run_config(base).config.model.parameter_count()
    assert checkpoint_bytes(count, stage, precision) == expected * M


@pytest.mark.parametrize("name", presets(trained=True))
def test_more_ranks_and_more_offload_never_need_more_and_bigger_batches_never_less(name):
    config = load_run_config(name, ["engine.zero_stage=3"]).config

    def need(world, micro, sets=()):
        changed = load_run_config(name, ["engine.zero_stage=3", *sets]).config if sets else config
        batch = ResolvedBatch(global_batch_size=micro * world, micro_batch_size=micro, gradient_accumulation_steps=1,
                              data_parallel_size=world)
        return rank_memory(changed, batch, "bf16", "cuda").device_bytes

    assert need(1, 4) >= need(2, 4) >= need(8, 4) >= need(64, 4)
    assert need(8, 1) <= need(8, 4) <= need(8, 16) < need(8, 1024)  # the peak of small ones may lie in the build
    assert need(8, 4, ["engine.offload.optimizer=cpu"]) <= need(8, 4)
    assert need(8, 4, ["engine.activation_checkpointing=true"]) <= need(8, 4, ["engine.activation_checkpointing=false"])


@pytest.mark.parametrize("name", presets(trained=True))
@pytest.mark.parametrize("gib", [1, 4, 80])
def test_the_largest_micro_batch_fits_and_the_next_does_not(name, gib):
    config = load_run_config(name).config
    micro = largest_micro_batch(config, 2, gib * 2**30, precision="bf16", device="cuda")

    def fits(size):
        batch = ResolvedBatch(global_batch_size=2 * size, micro_batch_size=size, gradient_accumulation_steps=1,
                              data_parallel_size=2)
        return rank_memory(config, batch, "bf16", "cuda").device_bytes <= gib * 2**30

    assert micro == 0 or fits(micro)
    assert not fits(micro + 1)


@pytest.mark.parametrize(("sets", "texts", "width"), [
    ([], 8, 160),  # a chunk
    (["objective.grad_cache=false"], 8 * 8 * 3, 160),  # query, positive and negative of every triplet of the update
    (["objective.grad_cache=false", "objective.contrastive_batch=micro_batch"], 8 * 3, 160),
    (["objective.grad_cache=false", "data.source.query_length=40"], 8 * 8, 40 + 2 * 160),
    (["objective.grad_cache=false", "objective.profile=compat", "data.source.query_length=40"], 8 * 3, 160)])
def test_without_caching_the_activations_of_all_texts_that_are_contrasted_count(sets, texts, width):
    def activations(more):
        return terms(plan_of("spectra-m456", more, precision="bf16", device="cuda", epoch_samples=98000),
                     "backward")["activations"]

    one = activations(["batch.micro_batch_size=1"]) / 160
    assert activations(sets) == pytest.approx(one * texts * width, rel=1e-6)


def test_the_largest_micro_batch_without_caching_counts_the_accumulation_of_the_config():
    def largest(*sets):
        return largest_micro_batch(load_run_config("spectra-m456", list(sets)).config, 2, 80 * 2**30, precision="bf16",
                                   device="cuda")

    cached, uncached = largest(), largest("objective.grad_cache=false")
    assert 0 < uncached <= cached // 24
    alone = largest("objective.grad_cache=false", "batch.gradient_accumulation_steps=1")
    assert uncached == alone // 8


@pytest.mark.parametrize("world", [1, 8])
def test_patience_and_health_count_from_the_same_share_of_a_run_on_any_number_of_ranks(world):
    def told(*sets):
        config = load_run_config("spectra-m456", list(sets)).config
        plan = make_plan(config, world, precision="bf16", device="cuda", epoch_samples=98000)
        return never_counts(config, plan.batch, plan.steps), plan.steps * 8

    lines, micro_steps = told()
    assert lines == []
    for key, meaning in (("train.patience_after", "train.patience never ends it"),
                         ("eval.embedding.health_after", "no evaluation warns of a collapse")):
        lines, micro_steps = told(f"{key}=5000 micro_steps")
        beyond = f"{key}: 5000 micro_steps are more than the run has ({micro_steps:,}): {meaning}"
        assert lines == ([beyond] if world == 8 else [])
    assert told("train.patience=null", "train.patience_after=1M samples", "eval.every=null")[0] == []


def big(monkeypatch, trainable, frozen):
    """Give the toy model other parameter counts."""
    from pretrain.config.model import ParameterCount
    toy = __import__("toy_schema").Toy
    monkeypatch.setattr(toy, "parameter_count",
                        lambda self: ParameterCount(total=trainable + frozen, trainable=trainable))
