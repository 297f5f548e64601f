"""The wrapper equals the transformers model it wraps where that is right, and keeps documents apart where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertModel, GPT2LMHeadModel, LlamaForCausalLM
from transformers.activations import ACT2FN

from pretrain.config.run import OptimConfig
from pretrain.models.base import BuildContext, EncoderOutput
from pretrain.models.baseline.family import FAMILY
from pretrain.models.baseline.schema import BaselineConfig

V, T = 97, 40
BODIES = ["llama", "gpt2", "bert"]
LANGUAGE_MODELS = ["llama", "gpt2"]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Queries are cut into three blocks here, as they are in longer windows."""
    monkeypatch.setattr("pretrain.models.baseline.model.QUERY_BLOCK", 16)


def config(body, **changes):
    values = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
              "max_position_embeddings": 64, "num_kv_heads": 2 if body == "llama" else None, "initializer_range": 0.1}
    return BaselineConfig(body=body, **{**values, **changes})


def build(body, ctx=None, **changes):
    return FAMILY.build(config(body, **changes), ctx or BuildContext(seed=1)).eval()


def tokens(rows=2, length=T, seed=0):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def states(model, ids, **inputs):
    """What the model says at each position."""
    if model.config.body == "bert":
        return model(ids, **inputs).aux["token_states"]
    return model(ids, return_logits=True, **inputs).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_equals_the_exported_transformers_model(body):
    model = build(body)
    native = FAMILY.export(model)
    assert type(native) is {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "bert": BertModel}[body]
    ids = tokens()
    out = native(ids)
    close(states(model, ids), out.last_hidden_state if body == "bert" else out.logits)
    assert native.get_input_embeddings().weight is model.get_input_embeddings().weight
    native.set_attn_implementation("eager")
    assert model.native.config._attn_implementation != "eager"


@pytest.mark.parametrize("body", BODIES)
def test_export_survives_a_plain_transformers_round_trip(body, tmp_path):
    model = build(body)
    FAMILY.export(model).save_pretrained(tmp_path)
    auto = AutoModel if body == "bert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens()
    out = loaded(ids)
    close(states(model, ids), out.last_hidden_state if body == "bert" else out.logits)


def test_the_fused_activation_is_gpt2s_own():
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(ACT2FN["gelu_pytorch_tanh"](x), ACT2FN["gelu_new"](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["ours", "sdpa", "eager"])
@pytest.mark.parametrize("body", BODIES)
def test_documents_and_padding_are_kept_apart_on_every_attention_path(body, attention):
    model = build(body)
    if attention != "ours":
        model.native.set_attn_implementation(attention)
    ids = tokens()
    documents = torch.tensor([[0] * 10 + [1] * 20 + [2] * 10, [5] * 3 + [9] * 37])
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, 34:], mask[1, :2] = 0, 0
    together = states(model, ids, document_ids=documents, attention_mask=mask)
    for row, start, stop in [(0, 0, 10), (0, 10, 30), (0, 30, 34), (1, 2, 3), (1, 3, 40)]:
        close(together[row, start:stop], states(model, ids[row:row + 1, start:stop])[0])


@pytest.mark.parametrize("body", BODIES)
def test_without_boundaries_ids_and_masks_change_no_bit(body):
    model = build(body)
    ids = tokens()
    ones = torch.ones(2, T, dtype=torch.long)
    plain = states(model, ids)
    assert torch.equal(plain, states(model, ids, document_ids=7 * ones, attention_mask=ones))


@pytest.mark.parametrize("body", BODIES)
def test_the_kernel_path_of_accelerators_equals_the_blocked_one(body, monkeypatch):
    """Where blocks are not cut, torch's kernel gets no mask at all, or the additive one."""
    model = build(body)
    ids, documents = tokens(), (torch.arange(T) > 11).long().expand(2, T)
    expected = states(model, ids), states(model, ids, document_ids=documents)
    masks = []
    original = type(model)._masking

    def unblocked(self, *args, **kwargs):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        masking = original(self, *args, **kwargs)
        monkeypatch.undo()
        masks.append(masking.attention_mask)
        assert masking.attention_blocks is None
        return masking

    for inputs, want in zip(({}, {"document_ids": documents}), expected, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_masking", unblocked)
            close(states(model, ids, **inputs), want)
    assert masks[0] is None and masks[1].shape == (2, 1, T, T)


@pytest.mark.parametrize("body", LANGUAGE_MODELS)
def test_sums_are_those_of_the_logits(body):
    model = build(body)
    ids, labels = tokens(), tokens(seed=1)
    labels[:, ::5] = -100
    out = model(ids, labels=labels, return_logits=True)
    close(out.nll_sum, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert out.n_tokens == (labels != -100).sum() and out.n_correct == (out.logits.argmax(-1) == labels).sum()
    close(out.terms["z"][0], out.logits.logsumexp(-1)[labels != -100].square().sum())
    assert model(ids, labels=labels).logits is None and out.past_key_values is None
    close(model(ids, return_logits=True, logits_to_keep=3).logits, out.logits[:, -3:])


@pytest.mark.parametrize("body", BODIES)
def test_checkpointing_changes_no_gradient(body):
    grads = []
    for checkpointing in (False, True):
        model = build(body, BuildContext(seed=1, activation_checkpointing=checkpointing)).train()
        ids = tokens()
        documents = (torch.arange(T) > 11).long().expand(2, T)
        out = model(ids, document_ids=documents, **({} if body == "bert" else {"labels": ids}))
        (out.heads["mean"].square().sum() if body == "bert" else out.nll_sum).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
    for name, grad in grads[0].items():
        assert grad is not None, name
        close(grad, grads[1][name])


@pytest.mark.parametrize("body", LANGUAGE_MODELS)
def test_decoding_with_documents_equals_forward(body):
    """Prompt at once, then two tokens, then one by one; ids and mask cover what the cache holds."""
    model = build(body)
    ids = tokens(length=20)
    documents = torch.tensor([[0] * 5 + [1] * 15, [0] * 20])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    whole = states(model, ids, document_ids=documents, attention_mask=mask)
    plain = states(model, ids)
    for want, given in ((whole, {"document_ids": documents, "attention_mask": mask}), (plain, {})):
        past, got = None, []
        for start, stop in [(0, 9), (9, 11)] + [(t, t + 1) for t in range(11, 20)]:
            out = model(ids[:, start:stop], past_key_values=past, use_cache=True, return_logits=True,
                        **{k: v[:, :stop] for k, v in given.items()})
            past = out.past_key_values
            got.append(out.logits)
        close(torch.cat(got, 1), want)


@pytest.mark.parametrize("body", LANGUAGE_MODELS)
def test_generate_is_greedy_over_forward_and_ignores_left_padding(body):
    model = build(body)
    prompt = tokens(1, 6)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, states(model, expected)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), expected)
    padded = torch.cat([tokens(1, 4, seed=3), prompt], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], expected)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_keep_every_bit(body, tied, tmp_path):
    model = build(body, tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(tmp_path).document_masking is True
    auto = AutoModel if body == "bert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert torch.equal(states(model, tokens()), states(loaded, tokens()))
    if body != "bert":
        table, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert (table is head) == tied


def test_encoder_heads_pool_real_tokens_only():
    model = build("bert")
    ids = tokens(3)
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, 25:], mask[1, :7], mask[2] = 0, 0, 0
    out = model(ids, attention_mask=mask)
    assert isinstance(out, EncoderOutput) and out.default == "mean"
    right, left = model(ids[:1, :25]), model(ids[1:2, 7:])
    for head in ("mean", "cls"):
        close(out.heads[head][0], right.heads[head][0])
        close(out.heads[head][1], left.heads[head][0])
    assert out.heads["mean"][2].abs().max() == 0


@pytest.mark.parametrize("body", BODIES)
def test_weights_depend_on_the_seed_alone(body):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build(body, BuildContext(seed=4))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(999)
    second, third = build(body, BuildContext(seed=4)), build(body, BuildContext(seed=5))
    pairs = [(first.state_dict()[k], second.state_dict()[k], third.state_dict()[k]) for k in first.state_dict()]
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("body", BODIES)
def test_initial_weights_have_the_asked_spread(body):
    model = FAMILY.build(config(body, hidden_size=128, initializer_range=0.02, num_layers=8), BuildContext())
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = body == "gpt2" and "c_proj" in name
            assert p.std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.12), name
        else:
            assert p.unique().numel() == 1, name


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else_does(body, tied):
    model = build(body, tie_embeddings=tied)
    groups = {g.name: g for g in FAMILY.parameter_groups(model, OptimConfig(weight_decay=0.3))}
    assert groups["decay"].weight_decay == 0.3 and groups["no_decay"].weight_decay == 0.0
    everything = [id(p) for g in groups.values() for p in g.params]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})
    decayed = {id(p) for p in groups["decay"].params}
    for name, p in model.named_parameters():
        is_table = any(part in name for part in ("embed", "wte", "wpe"))
        assert (id(p) in decayed) == (p.ndim == 2 and not is_table), name


def test_frozen_parameters_stand_in_no_group():
    model = build("llama")
    model.get_input_embeddings().requires_grad_(False)
    params = [p for g in FAMILY.parameter_groups(model, OptimConfig()) for p in g.params]
    assert all(p.requires_grad for p in params)


def test_impossible_inputs_are_named():
    model = build("gpt2")
    with pytest.raises(ValueError, match="65 tokens, but max_position_embeddings is 64"):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"document_ids has shape \(2, 3\)"):
        model(tokens(), document_ids=torch.zeros(2, 3, dtype=torch.long))


def test_dropout_is_drawn_in_training_only():
    model = build("llama", dropout=0.5)
    ids = tokens()
    assert torch.equal(states(model, ids), states(model, ids))
    model.train()
    assert not torch.equal(states(model, ids), states(model, ids))


def test_bf16_follows_fp32():
    wide = build("llama", initializer_range=0.02)
    narrow = copy.deepcopy(wide).bfloat16()
    ids, documents = tokens(), (torch.arange(T) > 11).long().expand(2, T)
    a, b = (m(ids, labels=ids, document_ids=documents).nll_sum for m in (wide, narrow))
    assert b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


@pytest.mark.parametrize("body", LANGUAGE_MODELS)
def test_autocast_follows_fp32(body):
    model = build(body, initializer_range=0.02)
    ids, documents = tokens(), (torch.arange(T) > 11).long().expand(2, T)
    exact = model(ids, labels=ids, document_ids=documents).nll_sum
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids, document_ids=documents).nll_sum
    rounded.backward()
    torch.testing.assert_close(exact, rounded, rtol=1e-3, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
