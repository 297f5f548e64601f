"""The backbone's weights from folders of every kind, and adapters in a model that is there already."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from evaluation.untrained import untrained
from pretrain.engine.consolidate import load_initial_weights
from pretrain.errors import UserError
from pretrain.models.afrb.inject import get_pvm_readout, inject_afrb_adapters
from pretrain.models.afrb.weights import load_backbone
from pretrain.models.base import BuildContext
from pretrain.models.baseline.family import FAMILY as BASELINE
from pretrain.models.baseline.schema import BaselineConfig
from tests.models.afrb_small import BACKBONES, MODES, Alone, V, build, config, hooks, open_up, run_config, tokens

ROPE = {"rope_type": "default", "rope_theta": 5e5}
HF = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
      "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}


def native(kind):
    torch.manual_seed(7)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**HF, rope_parameters=ROPE)).eval()
    if kind.startswith("mistral"):
        window = 7 if kind == "mistral, window" else None
        return MistralForCausalLM(MistralConfig(**HF, sliding_window=window)).eval()
    if kind == "gpt_neo":
        return GPTNeoForCausalLM(GPTNeoConfig(**{key: value for key, value in BACKBONES[kind].items()
                                                 if key != "model_type"})).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                      initializer_range=0.1)).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("disable_attn", [False, True])
def test_weights_come_from_a_hugging_face_folder(kind, disable_attn, tmp_path):
    source = native(kind)
    source.save_pretrained(tmp_path)
    rope = {"rope_parameters": ROPE} if kind == "llama" else {}
    model = build({"disable_attn": disable_attn, "backbone": {"hf_config": {**BACKBONES[kind], **rope}}})
    load_backbone(model, tmp_path)
    if disable_attn:
        torch.testing.assert_close(model.get_output_embeddings().weight, source.get_output_embeddings().weight)
        return
    ids = tokens()
    torch.testing.assert_close(model(ids, return_logits=True).logits, source(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_window_of_attention_is_that_of_mistral():
    """Ours on Llama is theirs; of two windows the smaller counts, and one longer than the text changes nothing."""
    theirs, ids = native("mistral, window"), tokens()
    want = theirs(ids).logits
    assert not torch.allclose(native("mistral")(ids).logits, want, rtol=1e-2)
    for window, given in ((7, None), (7, 50), (50, 7), (7, 7)):
        source = native("mistral")
        source.config.sliding_window = given
        model = inject_afrb_adapters(source, n_afrb=1, attention_window=window).eval()
        torch.testing.assert_close(model(ids, return_logits=True).logits, want, rtol=1e-4, atol=1e-5)
    whole, source = inject_afrb_adapters(native("mistral"), n_afrb=1, attention_window=64).eval(), native("mistral")
    torch.testing.assert_close(whole(ids, return_logits=True).logits, source(ids).logits, rtol=1e-4, atol=1e-5)


def test_weights_come_from_exports_of_this_stack(tmp_path):
    """A native export, a wrapped one, one without the tied output table, and published GPT-2 names."""
    plain = BASELINE.build(BaselineConfig(body="gpt2", vocab_size=V, hidden_size=32, num_layers=2, num_heads=4,
                                          max_position_embeddings=64), BuildContext(seed=3)).eval()
    ids = tokens()
    want = plain(ids, return_logits=True).logits
    BASELINE.export(plain).save_pretrained(tmp_path / "native")
    plain.save_pretrained(tmp_path / "wrapped")
    bare = {name.removeprefix("transformer."): value.clone() for name, value in plain.native.state_dict().items()
            if "lm_head" not in name}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    for folder in ("native", "wrapped", "bare"):
        model = build({}, "gpt2")
        load_backbone(model, tmp_path / folder)
        torch.testing.assert_close(model(ids, return_logits=True).logits, want, rtol=1e-4, atol=1e-5)


def test_attention_that_training_went_without_comes_back_with_the_backbone(tmp_path):
    """A run without attention goes on with it: what that run holds is taken, the rest are the backbone's weights."""
    native("llama").save_pretrained(tmp_path / "backbone")
    there = {"hf_config": {**BACKBONES["llama"], "rope_parameters": ROPE}, "weights": str(tmp_path / "backbone")}
    first = build({"disable_attn": True, "backbone": there})
    open_up(first)
    first.save_pretrained(tmp_path / "first")
    for weights in (there["weights"], None):
        section = {"disable_attn": False, "backbone": {**there, "weights": weights}}
        second = build(section)
        around = hooks(section, init_from=str(tmp_path / "first"))
        if weights is None:
            with pytest.raises(UserError, match=r"holds no backbone.native.model.layers.0.self_attn"):
                load_initial_weights(second, str(tmp_path / "first"), partitioned=False, supplied=around.supplies)
            continue
        missing = load_initial_weights(second, str(tmp_path / "first"), partitioned=False, supplied=around.supplies)
        assert missing == second.state_dict().keys() - first.state_dict().keys()
        with torch.no_grad():
            second.backbone.native.model.norm.weight.fill_(3.0)  # held by the first: not to be read again
        around.before_engine(Alone(second, missing=missing))
        for name, value in second.state_dict().items():
            if name in missing:
                assert torch.equal(value, native("llama").state_dict()[name.removeprefix("backbone.native.")])
            elif not name.endswith("model.norm.weight"):
                assert torch.equal(value, first.state_dict()[name]), name
        assert float(second.backbone.native.model.norm.weight.detach().mean()) == 3.0
        before_training = untrained(run_config(section, init_from=str(tmp_path / "first")), torch.device("cpu"))
        for name, value in before_training.state_dict().items():
            if not name.endswith("model.norm.weight"):
                assert torch.equal(value, second.state_dict()[name]), "evaluation finds what training begins with"


def test_folders_that_do_not_fit_are_named(tmp_path):
    model = build()
    with pytest.raises(UserError, match=r"model.backbone.weights: .* is no folder"):
        load_backbone(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no .safetensors file"):
        load_backbone(model, tmp_path)
    native("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"holds no model.embed_tokens.weight"):
        load_backbone(model, tmp_path / "gpt2")
    LlamaForCausalLM(LlamaConfig(**{**HF, "vocab_size": 50})).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[50, 32\] in .*makes it \[97, 32\]"):
        load_backbone(model, tmp_path / "small")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"torn.*cannot be read"):
        load_backbone(model, tmp_path / "torn")


def test_the_hooks_read_weights_of_fresh_runs_only(tmp_path):
    source = native("gpt2")
    source.save_pretrained(tmp_path)
    cfg = config({"disable_attn": True}, "gpt2")
    named = cfg.model_copy(update={"backbone": cfg.backbone.model_copy(update={"weights": str(tmp_path)})})
    for init_from, equal in ((None, True), ("elsewhere", False)):
        model = build({"disable_attn": True}, "gpt2")
        run = hooks({"disable_attn": True})
        run.cfg, run.fresh = named, init_from is None
        run.before_engine(Alone(model))
        assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight) == equal


@pytest.mark.parametrize("kind", ["llama", "mistral", "mistral, window", "gpt2", "gpt_neo"])
def test_adapters_in_a_model_that_is_there(kind):
    """The wrapped model starts as the given one, on the same weights; readouts come back with their state."""
    source = native(kind)
    ids = tokens()
    wrapped = inject_afrb_adapters(source, n_afrb=2).eval()
    torch.testing.assert_close(wrapped(ids, return_logits=True).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
    assert wrapped.get_output_embeddings().weight is source.get_output_embeddings().weight
    assert len(wrapped.afrb_adapters) == 2 and wrapped.schema.alpha == 0.04
    remembering = inject_afrb_adapters(source, 1, 0.04, 6.0, 0.2, "cpu", True, 0.3, 0.9, disable_attn=True,
                                       readout_mode="state").eval()
    assert remembering.schema.pvm_beta == 0.9
    whole, _ = get_pvm_readout(remembering, ids)
    _, state = get_pvm_readout(remembering, ids[:, :30])
    torch.testing.assert_close(get_pvm_readout(remembering, ids[:, 30:], state)[0], whole, rtol=1e-4, atol=1e-4)
    trained = inject_afrb_adapters(native(kind), train_backbone=True)
    assert all(p.requires_grad for p in trained.parameters())
    bert = BertModel(BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                intermediate_size=32))
    with pytest.raises(ValueError, match="sees tokens on both sides"):
        inject_afrb_adapters(bert)


@pytest.mark.parametrize("mode", ["adapter with attention", "trace", "state, original order",
                                  "learned query, write gate, ladder", "matrix, delta, content, gate"])
def test_adapters_in_fp32_stand_in_a_model_of_16_bits(mode):
    """The backbone stays in bf16, and so do the states it is given; the loss follows that of the fp32 model."""
    source = native("llama")
    options = {"n_afrb": 1, **MODES[mode]}
    use_pvm = options.pop("enable_pvm", False)
    ids = tokens()
    losses = []
    for model in (source, copy.deepcopy(source).bfloat16()):
        wrapped = open_up(inject_afrb_adapters(model, use_pvm=use_pvm, **options))
        assert {p.dtype for p in wrapped.backbone.parameters()} == {model.dtype}
        assert {p.dtype for n, p in wrapped.named_parameters() if not n.startswith("backbone")} == {torch.float32}
        out = wrapped(ids, labels=ids, diagnostics=True)
        assert out.diagnostics["adapted"].dtype == model.dtype
        out.nll_sum.backward()
        losses.append(float(out.nll_sum.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_matrix_memory_that_is_put_in_has_a_scale():
    """It is measured on random ids, where a run measures it on its data; a given one stays."""
    def scale(**options):
        memory = inject_afrb_adapters(native("llama"), 0, use_pvm=True, pvm_memory="matrix", pvm_dk=16, pvm_dv=8,
                                      **options).memory
        return float(memory.log_scale().detach().exp())
    assert scale() == scale(seed=0) >= 10
    assert scale(pvm_scale=3.0) == pytest.approx(3.0)
