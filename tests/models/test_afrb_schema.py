"""AFRB's closed forms equal what is built and measured; options that contradict each other name a cure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config.needle import NeedleConfig
from pretrain.config.run import OptimConfig, RunConfig
from pretrain.metrics.flops import counted_flops
from pretrain.models.afrb.family import CSV_COLUMNS, FAMILY
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.base import BuildContext
from tests.models.afrb_small import BACKBONES, MATRIX, MODES, VECTOR, T, V, config, hooks

META = BuildContext(device=torch.device("meta"))


def check_counts(cfg, length):
    model = FAMILY.build(cfg, META)
    count = cfg.parameter_count()
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    counted = counted_flops(model, {"input_ids": ids, "labels": ids})
    assert cfg.flops_per_token(length) * length == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(("mode", "backbone"), [*((mode, "llama") for mode in MODES), *(
    (mode, backbone) for backbone in ("gpt2", "gpt_neo", "mistral") for mode in ("trace", "matrix with attention"))])
def test_counts_of_every_mode(mode, backbone):
    check_counts(config(mode, backbone), 33)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(backbone=st.sampled_from(sorted(BACKBONES)), blocks=st.integers(0, 4), mixer=st.sampled_from(["glu", "conv"]),
       phase=st.sampled_from(["rotate", "embed", "none"]), memory=st.sampled_from([None, "vector", "matrix"]),
       disable=st.sampled_from([None, "zero", "identity"]), gate=st.booleans(), dk=st.integers(1, 9),
       mode=st.sampled_from(["trace", "state", "window:9"]), query=st.sampled_from(["mean_tail", "learned"]),
       clock=st.sampled_from(["token", "content", "learned", "none"]), rule=st.sampled_from(["hebb", "delta", "gated"]),
       length=st.sampled_from([16, 63]))
def test_counts_of_any_options(backbone, blocks, mixer, phase, memory, disable, gate, dk, mode, query, clock, rule,
                               length):
    options = {"n_afrb": blocks, "mixer": mixer, "phase_mode": phase, "disable_attn": disable is not None,
               "disable_attn_mode": disable or "zero", "pvm_write_gate": gate, "readout_mode": mode,
               "pvm_gate_marks": 3 * (dk % 3),
               "needle_query_mode": query}
    if memory == "matrix":
        options |= {"enable_pvm": True, "pvm_memory": memory, "pvm_dk": 2 * dk, "pvm_dv": 5, "pvm_phase_clock": clock,
                    "pvm_rule": rule, "pvm_content_frequencies": 3, "pvm_separate_query": dk % 2 == 0}
    elif memory == "vector" and blocks:
        options |= {"enable_pvm": True, "pvm_phase_clock": "token" if dk % 2 else "log"}
    check_counts(config(options, backbone), length)


def saved_bytes(cfg, dtype, scored=None, rows=2, length=128):
    """Distinct storages that autograd keeps, parameters and buffers apart."""
    model = FAMILY.build(cfg, BuildContext(dtype=dtype)).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    ids = torch.zeros(rows, length, dtype=torch.long)
    documents = (torch.arange(length) > 60).long().expand(rows, length)
    places = None if scored is None else torch.arange(length - scored, length).expand(rows, scored)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(ids, labels=ids, document_ids=documents, readout_positions=places)
    del out
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own) / (rows * length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "backbone"), [
    ("adapter with attention", "llama"), ("adapter with attention", "gpt2"), ("trace", "llama"), ("trace", "gpt2"),
    ("conv mixer, two blocks", "llama"), ("state", "gpt_neo"), ("matrix", "llama"),
    ("matrix, delta, content, gate", "gpt2"), ("matrix, gated decay", "llama"),
    ("learned query, write gate, ladder", "llama")])
def test_activation_bytes_are_those_that_autograd_keeps(mode, backbone, dtype):
    """Within 15 %, at a width where the memory's constants do not hide the rest."""
    wide = {"vocab_size": 2, "max_position_embeddings": 256, "n_positions": 256,
            **{"n_embd" if backbone == "gpt2" else "hidden_size": 96}}
    cfg = AFRBConfig.model_validate({"backbone": {"hf_config": {**BACKBONES[backbone], **wide}}, **MODES[mode]})
    for scored in (None, 8):
        said = cfg.activation_bytes_per_token(128, element_bytes=dtype.itemsize, checkpointing=False, scored=scored)
        assert said == pytest.approx(saved_bytes(cfg, dtype, scored), rel=0.15)


@pytest.mark.parametrize("mode", MODES)
def test_tiny_siblings_and_round_trips(mode):
    cfg = config(mode)
    tiny = cfg.tiny().with_vocab_size(300)
    assert tiny.kind == "causal_lm" and tiny.vocab_size == 300 and tiny.parameter_count().total < 500_000
    for each in (cfg, tiny):
        assert AFRBConfig.model_validate(each.model_dump(by_alias=True)) == each


@pytest.mark.parametrize(("mode", "backbone"), [(m, "llama") for m in MODES] + [("trace", "gpt2")])
def test_every_trainable_parameter_stands_in_one_group(mode, backbone):
    model = FAMILY.build(config(mode, backbone), META)
    groups = FAMILY.parameter_groups(model, OptimConfig(lr=1e-3, weight_decay=0.3))
    ids = [id(p) for g in groups for p in g.params]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {g.name: g for g in groups}
    assert all(g.weight_decay == (0.3 if g.name == "matrices" else 0.0) for g in groups)
    if "omega" in by_name:
        assert by_name["omega"].lr_scale == pytest.approx(1e-7 / 1e-3)
        assert by_name["omega"].betas[0] == 0, "momentum would move it between its updates"


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_backbone_can_be_trained_too(backbone):
    """It counts as trainable, its matrices decay and its tables do not, and what autograd keeps of it is known."""
    wide = {"vocab_size": 2, "max_position_embeddings": 256, "n_positions": 256,
            **{"n_embd" if backbone == "gpt2" else "hidden_size": 96}}
    hf = {**BACKBONES[backbone], **wide}
    for mode in ("adapter with attention", "trace"):
        cfg = AFRBConfig.model_validate({"backbone": {"hf_config": hf, "trained": True}, **MODES[mode]})
        model = FAMILY.build(cfg, META)
        count = cfg.parameter_count()
        assert count.trainable == count.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
        groups = {g.name: {id(p) for p in g.params} for g in FAMILY.parameter_groups(model, OptimConfig())}
        assert sum(map(len, groups.values())) == sum(1 for _ in model.parameters())
        tables = {id(m.weight) for m in model.backbone.modules() if isinstance(m, torch.nn.Embedding)}
        assert tables <= groups["vectors"]
        assert {id(p) for p in model.backbone.parameters() if p.dim() == 2} - tables <= groups["matrices"]
        said = cfg.activation_bytes_per_token(128, element_bytes=4, checkpointing=False)
        assert said == pytest.approx(saved_bytes(cfg, torch.float32, None), rel=0.15)


def test_sizes_of_the_specification():
    """About 2 D^2 a block: 8.4M at width 2048 (spec, section 2), and TinyLlama's 1.1B around it."""
    tinyllama = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
                 "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
                 "max_position_embeddings": 2048, "tie_word_embeddings": False}
    cfg = AFRBConfig(backbone={"hf_config": tinyllama}, enable_pvm=True, readout_from="none")
    assert cfg.parameter_count().trainable == 2 * 2048**2 + 7 * 2048 + 3
    assert cfg.parameter_count().total - cfg.parameter_count().trainable == 1_100_048_384
    stripped = AFRBConfig(backbone={"hf_config": tinyllama}, disable_attn=True)
    assert cfg.backbone.parameter_count(None) - stripped.backbone.parameter_count("zero") == 22 * (
        2 * 2048**2 + 2 * 2048 * 256 + 2048)


def test_what_depends_on_the_kind_of_memory_is_filled_in():
    vector, matrix = config({**VECTOR}), config({**MATRIX})
    assert (vector.pvm_beta, vector.pvm_phase_clock, vector.pvm_omega_mode) == (0.85, "log", "scalar")
    assert (matrix.pvm_beta, matrix.pvm_phase_clock, matrix.pvm_omega_mode) == (1.0, "token", "uniform")
    assert config({**MATRIX, "pvm_beta": 0.99}).pvm_beta == 0.99
    assert config().readout_from == "none" and vector.readout_from == "pvm"
    assert config({**VECTOR, "readout_from": "both"}).readout_from == "pvm"


@pytest.mark.parametrize(("options", "key", "cure"), [
    ({"pvm_beta": 1.0, **VECTOR}, "model.pvm_beta", "below 1"),
    ({"readout_from": "pvm"}, "model.readout_from", "enable_pvm true"),
    ({"readout_from": "plm"}, "model.readout_from", "pvm or none"),
    ({"readout_head": "separate"}, "model.readout_head", "shared"),
    ({"kiss_ridge_calib": True}, "model.kiss_ridge_calib", "use pvm"),
    ({"n_afrb": 0, **VECTOR}, "model.enable_pvm", "1 to 4"),
    ({"pvm_phase_clock": "content", **VECTOR}, "model.pvm_phase_clock", "pvm_memory matrix"),
    ({"pvm_read": "step", "pvm_phase_clock": "log", **MATRIX}, "model.pvm_read", "clock token"),
    ({"pvm_query_taps": 9, **MATRIX}, "model.pvm_query_taps", "pvm_address_taps 4"),
    ({"adaptive_omega": True, "omega": 7.0}, "model.omega", "widen the bounds"),
    ({"adaptive_omega": True, "n_afrb": 2, "omega_delta": 1.0}, "model.omega", "7, at which a block begins, .*widen"),
    ({"adaptive_omega": True, "phase_mode": "none"}, "model.adaptive_omega", "phase_mode is none"),
    ({"enable_plm": True}, "model.enable_plm", "not implemented"),
    ({"pcm_enable": True}, "model.pcm_enable", "not implemented"),
    ({"pvm_carry_state": True}, "model.pvm_carry_state", "past_key_values"),
    ({"pvm2emb_ridge_recalib": 5}, "model.pvm2emb_ridge_recalib", "before the first step"),
])
def test_contradictions_name_key_and_cure(options, key, cure):
    with pytest.raises(ValidationError, match=f"{key}: .*{cure}"):
        config(options)


@pytest.mark.parametrize("options", [
    {"gamma": 1.0}, {"gamma": 0.0}, {"pvm_beta": 1.1}, {"pvm_beta": 0.0}, {"n_afrb": 5}, {"readout_mode": "window:0"},
    {"readout_mode": "all"}, {"n_afbr": 1}])
def test_values_out_of_range_and_unknown_keys_are_refused(options):
    with pytest.raises(ValidationError):
        config(options)


@pytest.mark.parametrize(("change", "cure"), [
    ({"model_type": "bert"}, "sees tokens on both sides.*llama, mistral"),
    ({"model_type": "lama"}, "lama is not known.*llama"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"intermediate_size": None}, "intermediate_size is missing"),
    ({"num_attention_heads": 5}, "describes no llama model.*num_heads"),
    ({"attention_bias": True}, "attention_bias true"),
    ({"head_dim": 16}, "head_dim 16 x 4 heads is not hidden_size 32"),
])
def test_backbones_that_cannot_be_had_are_named(change, cure):
    values = {k: v for k, v in {**BACKBONES["llama"], **change}.items() if v is not None}
    with pytest.raises(ValidationError, match=f"model.backbone.hf_config: .*{cure}"):
        AFRBConfig.model_validate({"backbone": {"hf_config": values}})


def test_hooks_give_the_ramps_of_the_specification(caplog):
    found = hooks({"n_afrb": 3, "phase_delta": 0.1, "block_warm_delta": 100, "block_ramp": 200, "phase_ramp": 50})
    assert found.controls(0) == {"rho_1": 0.0, "rho_2": 0.0, "rho_3": 0.0, "phase_ramp": 0.0}
    assert found.controls(150) == {"rho_1": 0.75, "rho_2": 0.25, "rho_3": 0.0, "phase_ramp": 1.0}
    assert found.controls(400) == {"rho_1": 1.0, "rho_2": 1.0, "rho_3": 1.0, "phase_ramp": 1.0}
    late = hooks("trace", block_ramp=0, kiss_ridge_calib=True, kiss_ridge_unfreeze_step=0, freeze_readout_steps=5,
                 adaptive_omega=True)
    assert late.controls(4) == {"rho_1": 1.0, "pvm2emb_trained": 0.0, "query_trained": 0.0, "omega_trained": 0.0}
    assert late.controls(10) == {"rho_1": 1.0, "pvm2emb_trained": 0.0, "query_trained": 1.0, "omega_trained": 1.0}
    hooks(sir_dim=512, phase_alignment_weight=0.1)
    assert "model.sir_dim" in caplog.text and "model.phase_alignment_weight" in caplog.text


def test_what_changes_nothing_is_said():
    assert config("matrix").notes() == config("trace").notes() == []
    said = config("matrix", pvm_alpha=0.5, t2_enable=True, readout_scale=2.0, freeze_readout_steps=9).notes()
    assert [note.split(":")[0] for note in said] == ["model.pvm_alpha", "model.t2_enable", "model.readout_scale",
                                                     "model.freeze_readout_steps"]
    assert [note.split(":")[0] for note in config("trace", pvm_dk=64, pvm_rule="delta").notes()] == [
        "model.pvm_dk", "model.pvm_rule"]
    assert [note.split(":")[0] for note in config("trace", attention_window=9).notes()] == ["model.attention_window"]
    assert config(attention_window=9).notes() == []
    assert config("learned query, write gate, ladder", freeze_readout_steps=9).notes() == []


def test_a_memory_that_forgets_the_needle_is_told(caplog):
    def run(**model):
        source = NeedleConfig(vocab_size=V, pool_margin=20, ctx_chunk_len=10, needle_len=2)
        return FAMILY.hooks(RunConfig.model_validate({
            "model": config("trace", **model).model_dump(by_alias=True), "objective": {"name": "needle"},
            "data": {"seq_len": source.seq_len, "source": source.model_dump()}}))
    run(pvm_beta=0.99)
    assert "pvm_beta" not in caplog.text
    run(pvm_beta=0.3)
    assert "model.pvm_beta 0.3: of the nearest needle" in caplog.text
    assert "a state holds the last 13 tokens" in caplog.text


def test_infonce_needs_something_that_is_said():
    def run(mode):
        return RunConfig.model_validate({
            "model": config(mode).model_dump(by_alias=True), "objective": {"name": "causal_lm", "infonce_weight": 0.3},
            "data": {"seq_len": T, "source": {"kind": "synthetic", "vocab_size": V}}})
    run("trace")
    with pytest.raises(ValidationError, match=r"model\.readout_from is none"):
        run("memory not read")


def test_columns_are_those_that_users_cut():
    assert len(CSV_COLUMNS) == 21 and CSV_COLUMNS[9].startswith("phase_coherence=")
    assert [c.split("=")[0] for c in CSV_COLUMNS[:5]] == ["step", "train_loss", "val_loss", "lr", "grad_norm"]


def test_findings():
    rules = {d.rule for row in (
        {"val/phase_coherence": 0.5, "val/pvm_memory_norm": 2.0, "val/pvm_gate_strength": 0.6},
        {"val/phase_coherence": 0.995, "val/gamma_saturation": 0.2, "val/pvm_memory_norm": 0.0, "step": 300,
         "val/pvm_gate_delta": 0.0})
        for d in FAMILY.diagnostics(None, row)}
    assert rules == {"C1", "C2", "M1", "M2", "G1", "G2"}
    assert not FAMILY.diagnostics(None, {"val/phase_coherence": 0.995}), "no block, no phase"
    assert not FAMILY.diagnostics(None, {"val/phase_coherence": 0.9, "val/pvm_memory_norm": 0.6, "step": 100,
                                         "val/pvm_gate_delta": 0.0, "val/pvm_gate_strength": 0.12})
