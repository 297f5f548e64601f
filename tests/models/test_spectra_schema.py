"""Closed-form counts of Spectra: the totals of its specification to the unit, and what is built and measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.config.objective import CausalLMConfig, MaskedLMConfig
from pretrain.errors import ConfigError
from pretrain.metrics.flops import counted_flops
from pretrain.models.base import BuildContext
from pretrain.models.spectra.family import FAMILY
from pretrain.models.spectra.schema import SpectraConfig

META = BuildContext(device=torch.device("meta"))
TOTALS = {"M300": 296_115_936, "M456": 466_406_896, "M600": 719_202_800, "M700": 1_036_249_328, "M1B": 2_388_144_384,
          "M600-fit": 601_176_560, "M700-fit": 696_363_248, "M1B-fit": 994_939_104}
PARTS = {  # per block, embeddings, heads, total without the spectral branch
    "M456": (17_582_658, 31_778_816, 12_642_240, 447_494_104),
    "M600": (27_548_930, 39_723_520, 18_302_400, 687_696_344),
    "M700": (40_136_834, 47_668_224, 25_294_016, 979_561_688),
    "M1B": (71_341_570, 63_557_632, 41_652_416, 2_253_811_936)}
TOGGLES = {"use_spectral": False, "enable_anchor64": False, "enable_entity": False, "enable_semantic": False,
           "learnable_fractal": False, "learnable_spectral_fusion": False, "fractal_depth": 0, "profile": "compat",
           "task": "masked_lm", "norm_position": "pre"}


def built(cfg):
    return sum(p.numel() for p in FAMILY.build(cfg, META).parameters())


@pytest.mark.parametrize("size", TOTALS)
def test_totals_are_those_of_the_specification(size):
    cfg = SpectraConfig(size=size)
    assert cfg.parameter_count().total == cfg.parameter_count().trainable == built(cfg) == TOTALS[size]
    if size in PARTS:
        block, tables, heads, bare = PARTS[size]
        assert cfg.block_parameters() == block
        assert cfg.trunk_parameters() == tables + cfg.num_layers * block + 2 * cfg.hidden_size
        assert sum(cfg.head_parameters().values()) == heads
        assert SpectraConfig(size=size, use_spectral=False).parameter_count().total == bare


@pytest.mark.parametrize("size", ["M456", "M1B-fit"])
@pytest.mark.parametrize("toggle", TOGGLES)
def test_every_toggle_is_counted(size, toggle):
    cfg = SpectraConfig.model_validate({"size": size, toggle: TOGGLES[toggle]})
    assert cfg.parameter_count().total == built(cfg)


def small(**changes):
    sizes = {"size": None, "vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_inner": 40,
             "spectral_dim": 12, "max_length": 40, "max_positions": 48, "sem_dims": (48, 32, 16), "ent_dims": (24, 12),
             "anchor_dim": 8, "retrieval_dim": 16, "ranking_dim": 64, "anomaly_basis": 4}
    return SpectraConfig.model_validate({**sizes, **changes})


@settings(deadline=None, derandomize=True, max_examples=30)
@given(heads=st.integers(1, 3), width=st.integers(4, 9), layers=st.integers(1, 3), inner=st.integers(5, 30),
       s=st.integers(2, 9), depth=st.integers(0, 3), explicit=st.booleans(), length=st.sampled_from([16, 33]),
       off=st.sets(st.sampled_from(["use_spectral", "enable_anchor64", "enable_entity", "enable_semantic",
                                    "learnable_fractal", "learnable_spectral_fusion"])),
       task=st.sampled_from(["embed", "masked_lm"]))
def test_counts_equal_the_built_model(heads, width, layers, inner, s, depth, explicit, length, off, task):
    cfg = small(hidden_size=8 * heads * width, num_heads=heads, num_layers=layers, ffn_inner=inner, spectral_dim=s,
                fractal_depth=depth, task=task, **dict.fromkeys(off, False),
                **({"attention_impl": "explicit"} if explicit else {}))
    assert cfg.parameter_count().total == built(cfg)
    ids = torch.zeros(2, length, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "attention_mask": ids} | ({"labels": ids} if task == "masked_lm" else {})
    counted = counted_flops(FAMILY.build(cfg, META), batch)
    assert cfg.flops_per_token(length) * ids.numel() == pytest.approx(counted, rel=1e-9)


def saved_bytes(cfg, dtype, checkpointing, rows=6, length=40):
    """Distinct storages that autograd keeps, parameters and buffers apart, a token."""
    model = FAMILY.build(cfg, BuildContext(dtype=dtype, activation_checkpointing=checkpointing)).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    ids = torch.zeros(rows, length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": (ids + torch.arange(length) < 30)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(**inputs, **({"labels": ids} if cfg.task == "masked_lm" else {}))
    del out
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own) / (rows * length)


@pytest.mark.parametrize("changes", [{}, {"use_spectral": False}, {"fractal_depth": 0}, {"attention_impl": "explicit"},
                                     {"fractal_depth": 2}, {"spectral_norm": "sum"}, {"task": "masked_lm"}])
@pytest.mark.parametrize(("dtype", "element_bytes"), [
    pytest.param(torch.float32, 4, marks=pytest.mark.slow), (torch.bfloat16, 2)])
def test_activation_bytes_are_those_that_autograd_keeps(changes, dtype, element_bytes):
    def config(layers):
        return SpectraConfig.model_validate({
            "size": None, "vocab_size": 2, "hidden_size": 128, "num_heads": 4, "ffn_inner": 512, "spectral_dim": 32,
            "max_length": 64, "num_layers": layers, "dropout": 0.0, **changes})

    said = config(4).activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=False)
    assert said == pytest.approx(saved_bytes(config(4), dtype, False), rel=0.03)
    said, kept = ([f(config(layers)) for layers in (2, 4)] for f in (
        lambda c: c.activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=True),
        lambda c: saved_bytes(c, dtype, True)))
    assert said[1] - said[0] == pytest.approx(kept[1] - kept[0], abs=1)
    assert said[0] > kept[0]  # and one block at a time


def test_a_name_that_claims_another_size_is_told():
    assert "warning" not in SpectraConfig(size="M456").summary()
    assert SpectraConfig(size="M456").summary()["claimed_parameters"] == 458_000_000
    assert "719,202,800 (+19.9%)" in SpectraConfig(size="M600").summary()["warning"]
    assert "warning" not in SpectraConfig(size="M600-fit").summary()
    assert "claimed_parameters" not in SpectraConfig(size="M600", num_layers=12).summary()


def test_sizes_and_profiles_set_defaults_that_may_be_overridden():
    cfg = SpectraConfig.model_validate({"size": "M700", "ffn_inner": 3072})
    assert (cfg.hidden_size, cfg.max_length, cfg.ffn_inner) == (1536, 256, 3072)
    assert cfg.parameter_count().total == TOTALS["M700-fit"]
    compat = SpectraConfig(profile="compat", spectral_norm="gate")
    assert (compat.spectral_norm, compat.attention_impl, compat.decay_exclude) == ("gate", "explicit", False)
    assert SpectraConfig(fractal_depth=3).attention_impl == "explicit"
    again = SpectraConfig.model_validate(compat.model_dump(by_alias=True))
    assert again == compat
    assert small().tiny().with_vocab_size(300).parameter_count().total < 500_000


@pytest.mark.parametrize(("values", "key", "cure"), [
    ({"num_heads": 3}, "model.num_heads", "1, 2, 4, 8"),
    ({"max_length": 520}, "model.max_length", "max_positions 512"),
    ({"max_length": 100}, "model.max_length", "use 96"),
    ({"size": None}, "model.ffn_inner", "all of"),
    ({"fractal_depth": 2, "attention_impl": "fused"}, "model.attention_impl", "use explicit"),
    ({"profile": "compat", "attention_impl": "fused"}, "model.attention_impl", "use explicit"),
    ({"fusion_init": 0.0}, "model.fusion_init", "between 0 and model.fusion_max"),
    ({"fusion_init": 0.6, "profile": "compat"}, "model.fusion_init", "above model.fusion_max"),
    ({"use_spectral": False, "spectral_entropy_gate": True}, "model.spectral_entropy_gate", "leave the branch in"),
])
def test_impossible_values_name_a_cure(values, key, cure):
    with pytest.raises((ConfigError, ValidationError)) as caught:
        SpectraConfig.model_validate(values)
    assert key in str(caught.value) and cure in str(caught.value)
    with pytest.raises(ValidationError, match="fall from the whole"):
        SpectraConfig(sem_dims=(256, 512))


@pytest.mark.parametrize(("model", "objective", "key", "cure"), [
    ({}, {"enable_semantic_nce": False}, "model.enable_semantic", "model.enable_semantic=false"),
    ({}, {"enable_bridge": False, "ent_nce_weight": 0.0}, "model.enable_entity", "model.enable_entity=false"),
    ({}, {"loss_weight_anchor": 0.0}, "model.enable_anchor64", "loss_weight_anchor"),
    ({}, {"loss_weight_sem": (1.0,)}, "objective.loss_weight_sem", "one for each"),
    ({"ranking_dim": 512}, {"nested_ranking": True}, "objective.nested_dims", "ranking_dim 512"),
    ({"sem_dims": (768, 512, 64)}, {}, "model.ent_dims", "which has 64"),
    ({"task": "masked_lm"}, {}, "objective.name", "use masked_lm"),
])
def test_heads_without_a_loss_and_losses_that_do_not_fit_are_refused(model, objective, key, cure):
    (problem,) = SpectraConfig.model_validate(model).objective_problems(ContrastiveConfig.model_validate(objective))
    assert problem.key == key and cure in problem.message


@pytest.mark.parametrize(("model", "objective"), [
    ({}, {}), ({"use_spectral": False}, {}), ({"enable_anchor64": False}, {}), ({}, {"enable_bridge": False}),
    ({}, {"enable_matry_angular": False}), ({"enable_entity": False}, {"enable_bridge": False, "ent_nce_weight": 0.0}),
    ({"profile": "compat"}, {"profile": "compat"}), ({}, {"profile": "compat", "enable_semantic_nce": False}),
    ({"enable_semantic": False}, {"enable_semantic_nce": False}), ({}, {"nested_ranking": True})])
def test_the_ablations_of_the_specification_are_taken(model, objective):
    """In compat the bridge pulls both of its sides, so that either head has a loss."""
    assert not list(SpectraConfig.model_validate(model).objective_problems(ContrastiveConfig.model_validate(objective)))


def test_the_objective_of_the_other_task_is_refused():
    assert not list(SpectraConfig(task="masked_lm").objective_problems(MaskedLMConfig()))
    for objective in (MaskedLMConfig(), CausalLMConfig()):
        (problem,) = SpectraConfig().objective_problems(objective)
        assert problem.key == "objective.name" and "use contrastive" in problem.message
    keys = [p.key for p in SpectraConfig(task="masked_lm", vocab_size=100).objective_problems(MaskedLMConfig())]
    assert keys == ["objective.vocab_size", "objective.mask_id"]
