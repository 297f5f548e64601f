from __future__ import annotations

import pytest

from pretrain.config.load import load_run_config
from pretrain.config.memory import rank_memory
from pretrain.config.presets import preset_path
from pretrain.config.relief import Relief, reliefs

GIB = 2**30


def run(*sets, preset="baseline-350m"):
    return load_run_config(preset_path(preset), sets).config


def found(config, world, limit, device="cuda", precision="bf16"):
    return reliefs(config, config.batch.resolve(world), precision, device, limit)


def applied(relief, *sets, world):
    """The relief as a user would apply it: `--set` for each setting; bytes that the estimate then gives."""
    ranks = dict(relief.settings).get("ranks", world)
    config = run(*sets, *(f"{key}={value}" for key, value in relief.settings if key != "ranks"))
    return rank_memory(config, config.batch.resolve(ranks), "bf16", "cuda").device_bytes


BATCH = ("batch={global_batch_size: 256, micro_batch_size: 64, gradient_accumulation_steps: null}", "data.seq_len=1024",
         "engine.activation_checkpointing=false", "engine.zero_stage=2", "engine.precision=bf16")


@pytest.mark.parametrize("batch", [(256, 64, "null"), (256, "null", 1), ("null", 64, 1)])
def test_what_is_suggested_fits_by_the_estimate_and_keeps_the_updates(batch):
    total, micro, accumulation = batch
    sets = (*BATCH[1:], f"batch={{global_batch_size: {total}, micro_batch_size: {micro}, "
            f"gradient_accumulation_steps: {accumulation}}}")
    config, seen = run(*sets), 0
    for limit in (1, 2, 4, 6, 8, 12, 16, 24, 40, 60):
        for relief in found(config, 4, limit * GIB):
            assert applied(relief, *sets, world=4) == relief.bytes <= limit * GIB
            seen += 1
            if "ranks" not in dict(relief.settings):
                settings = [f"{key}={value}" for key, value in relief.settings]
                assert run(*sets, *settings).batch.resolve(4).global_batch_size == 256
    assert seen > 10


def test_micro_batches_shrink_no_more_than_they_must():
    config = run(*BATCH)
    now = rank_memory(config, config.batch.resolve(4), "bf16", "cuda").device_bytes
    assert [relief.settings for relief in found(config, 4, now)] == [
        (("batch.micro_batch_size", 32),), (("engine.activation_checkpointing", True),),
        (("engine.offload.optimizer", "cpu"),)]
    assert [relief.settings for relief in found(config, 4, 10 * GIB)] == [
        (("batch.micro_batch_size", 4),), (("engine.activation_checkpointing", True),)]


def test_an_uncached_contrastive_batch_is_relieved_by_caching_not_by_smaller_micro_batches():
    sets = ("objective.grad_cache=false", "batch.gradient_accumulation_steps=64", "engine.precision=bf16")
    config = run(*sets, preset="spectra-m456")
    singles = [relief.settings for relief in found(config, 4, 40 * GIB)]
    assert (("objective.grad_cache", True),) in singles
    assert not any(key == "batch.micro_batch_size" for settings in singles for key, _ in settings)


def test_where_no_single_setting_is_enough_several_are_named_together():
    (relief,) = found(run(*BATCH), 4, 3 * GIB)
    assert relief.settings == (("batch.micro_batch_size", 1), ("engine.activation_checkpointing", True))
    (relief,) = found(run(*BATCH), 4, 2 * GIB)
    assert [key for key, _ in relief.settings[2:]] == ["engine.zero_stage", "engine.offload.optimizer"]
    assert found(run(*BATCH), 4, 2**20) == []


def test_at_last_more_ranks_are_named_where_they_help():
    sets = (*BATCH, "model.hidden_size=4096", "model.num_layers=30", "model.intermediate_size=11008",
            "model.num_heads=32", "engine.offload={optimizer: cpu, parameters: cpu}", "engine.zero_stage=3")
    (relief,) = found(run(*sets), 4, 30 * GIB, device="cpu")
    assert dict(relief.settings)["ranks"] > 4


def test_nothing_is_suggested_that_the_device_or_the_stage_does_not_have():
    on_cpu = (*BATCH[:3], "engine.zero_stage=2", "engine.precision=fp32")
    names = {key for limit in range(1, 60) for relief in found(run(*on_cpu), 2, limit * GIB, "cpu", "fp32")
             for key, _ in relief.settings}
    assert names and not any("offload" in name for name in names)
    alone = (*BATCH[:3], "engine.zero_stage=0", "engine.precision=fp32")
    assert [relief.settings[0][0] for relief in found(run(*alone), 1, 60 * GIB, precision="fp32")] == [
        "batch.micro_batch_size", "engine.activation_checkpointing"]


def test_a_relief_reads_as_settings_and_what_they_come_to():
    relief = Relief((("batch.micro_batch_size", 4), ("engine.activation_checkpointing", True)), 3 * GIB)
    assert str(relief) == "batch.micro_batch_size=4 and engine.activation_checkpointing=true (3.00 GiB)"
