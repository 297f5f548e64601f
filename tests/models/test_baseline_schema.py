"""Closed-form counts equal what is built and what is measured; wrong values are named with a cure."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config.load import load_run_config
from pretrain.config.registry import FAMILIES, resolve
from pretrain.metrics.flops import counted_flops
from pretrain.models.base import BuildContext
from pretrain.models.baseline.family import FAMILY
from pretrain.models.baseline.schema import BaselineConfig
from tests.presets import presets

META = BuildContext(device=torch.device("meta"))
KNOWN_COUNTS = {"demo": 3_344_064, "baseline-27m": 26_747_392, "baseline-124m": 124_439_808,
                "baseline-350m": 351_323_136, "baseline-1b": 1_040_254_976}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def batch(model, length):
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "labels": ids} if takes_labels else {"input_ids": ids}


@settings(deadline=None, derandomize=True, max_examples=25)
@given(body=st.sampled_from(["llama", "gpt2", "bert"]), heads=st.integers(1, 4), width=st.integers(2, 5),
       layers=st.integers(1, 3), inner=st.sampled_from([None, 7]), groups=st.integers(1, 4), tied=st.booleans(),
       length=st.sampled_from([16, 33]))
def test_counts_equal_the_built_model(body, heads, width, layers, inner, groups, tied, length):
    cfg = BaselineConfig(body=body, vocab_size=50, hidden_size=2 * heads * width, num_heads=heads, num_layers=layers,
                         num_kv_heads=groups if body == "llama" and heads % groups == 0 else None,
                         intermediate_size=inner, max_position_embeddings=64, tie_embeddings=tied)
    model = FAMILY.build(cfg, META)
    assert cfg.parameter_count().total == cfg.parameter_count().trainable == parameters(model)
    counted = counted_flops(model, batch(model, length))
    assert cfg.flops_per_token(length) * length == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("name", presets())
def test_every_preset_builds_and_has_the_size_its_schema_says(name):
    config = load_run_config(name).config
    cfg = config.model
    model = resolve(FAMILIES, cfg.family, "model.family").build(cfg, META)
    assert parameters(model) == cfg.parameter_count().total == KNOWN_COUNTS.get(name, parameters(model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == cfg.parameter_count().trainable
    for length in (64, config.data.seq_len):
        counted = counted_flops(model, batch(model, length))
        assert cfg.flops_per_token(length) * length == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", presets())
def test_every_preset_has_a_tiny_sibling_for_its_own_data(name):
    cfg = load_run_config(name).config.model
    tiny = cfg.tiny().with_vocab_size(300)
    assert type(tiny).model_validate(tiny.model_dump(by_alias=True)) == tiny
    assert tiny.kind == cfg.kind and tiny.vocab_size == 300 and tiny.parameter_count().total < 500_000


def saved_bytes(cfg, dtype, checkpointing, rows=2, length=40):
    """Distinct storages that autograd keeps, parameters and buffers apart."""
    model = FAMILY.build(cfg, BuildContext(dtype=dtype, activation_checkpointing=checkpointing)).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    ids = torch.zeros(rows, length, dtype=torch.long)
    documents = (torch.arange(length) > 20).long().expand(rows, length)
    inputs = {"input_ids": ids, "document_ids": documents}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(**inputs, labels=ids) if cfg.kind == "causal_lm" else model(**inputs)
    del out
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own) / (rows * length)


@pytest.mark.parametrize("body", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("dtype", "element_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_bytes_are_those_that_autograd_keeps(body, dtype, element_bytes):
    """Within 3%; with checkpointing the growth by layer is the block's input."""
    def config(layers, width=64):
        return BaselineConfig(body=body, vocab_size=2, hidden_size=width, num_heads=4, num_layers=layers,
                              num_kv_heads=2 if body == "llama" else None)

    for cfg in (config(3), config(2, 128)):
        said = cfg.activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=False)
        assert said == pytest.approx(saved_bytes(cfg, dtype, False), rel=0.03)
    said, kept = ([f(config(layers)) for layers in (2, 4)] for f in (
        lambda c: c.activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=True),
        lambda c: saved_bytes(c, dtype, True)))
    assert said[1] - said[0] == kept[1] - kept[0]
    inside = (config(4).activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=False)
              - config(3).activation_bytes_per_token(40, element_bytes=element_bytes, checkpointing=False))
    assert said[0] == pytest.approx(kept[0] + inside, rel=0.03)


def test_the_loss_keeps_logits_and_their_gradient_up_to_a_chunk():
    cfg = BaselineConfig(vocab_size=1000)
    assert cfg.loss_bytes(10, element_bytes=2) == 2 * 10 * 1000 * 2
    assert cfg.loss_bytes(10**9, element_bytes=2) == 256 * 2**20
    assert BaselineConfig(body="bert").loss_bytes(10, element_bytes=2) == 0


@pytest.mark.parametrize(("values", "key", "cure"), [
    ({"hidden_size": 256, "num_heads": 3}, "model.num_heads", "1, 2, 4, 8"),
    ({"hidden_size": 256, "num_heads": 8, "num_kv_heads": 3}, "model.num_kv_heads", "1, 2, 4, 8"),
    ({"body": "gpt2", "num_kv_heads": 2}, "model.num_kv_heads", "body llama"),
    ({"hidden_size": 12, "num_heads": 4}, "model.num_heads", "even width"),
])
def test_impossible_heads_name_a_cure(values, key, cure):
    with pytest.raises(ValidationError, match=f"{key}: .*{cure}"):
        BaselineConfig(**values)


def test_unknown_keys_and_bodies_are_refused():
    with pytest.raises(ValidationError, match="hidden"):
        BaselineConfig(hidden=64)
    with pytest.raises(ValidationError, match="llama"):
        BaselineConfig(body="mamba")
