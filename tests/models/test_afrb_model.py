"""AFRB as a language model: what it may see, identity at the start, decoding, rows, gradients, files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pretrain.config.run import OptimConfig
from pretrain.gates import run_gates
from pretrain.models.afrb.backbone import AttentionFreeLayer
from pretrain.models.afrb.calibration import whiten_tables
from pretrain.models.afrb.family import parameter_groups
from pretrain.models.afrb.infonce import infonce
from pretrain.models.base import BuildContext
from tests.models.afrb_small import BACKBONES, MODES, T, V, build, config, hooks, open_up, tokens, whole_table

CPU = torch.device("cpu")


def logits(model, ids, **inputs):
    return model(ids, return_logits=True, **inputs).logits


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_passes_the_gates(mode):
    """Causality, padding, documents, decode = forward, independence of the batch, loss on random tokens."""
    results = run_gates(build(mode), vocab_size=V, seq_len=T, seed=1, device=CPU)
    assert len(results) == 6 and all(r.passed for r in results), [r for r in results if not r.passed]


@pytest.mark.parametrize("backbone", ["gpt2", "gpt_neo", "mistral"])
@pytest.mark.parametrize("mode", ["trace", "matrix with attention", "conv mixer, two blocks"])
def test_every_backbone_passes_the_gates(backbone, mode):
    results = run_gates(build(mode, backbone), vocab_size=V, seq_len=T, seed=1, device=CPU)
    assert all(r.passed for r in results), [r for r in results if not r.passed]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("disable_attn", [False, True])
def test_a_fresh_adapter_is_the_identity_bit_for_bit(backbone, disable_attn):
    plain = build({"n_afrb": 0, "disable_attn": disable_attn}, backbone)
    with_adapters = build({"n_afrb": 3, "disable_attn": disable_attn, "enable_pvm": True, "readout_from": "none"},
                          backbone)
    with_adapters.backbone.load_state_dict(plain.backbone.state_dict())
    assert torch.equal(logits(with_adapters, tokens()), logits(plain, tokens()))
    open_up(with_adapters)
    assert not torch.equal(logits(with_adapters, tokens()), logits(plain, tokens()))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mode", ["zero", "identity"])
def test_without_blocks_and_attention_earlier_tokens_do_not_matter(backbone, mode):
    """Permuting all tokens before t leaves the logits at t as they are, bitwise; with attention they change."""
    ids = tokens(1)
    permuted = torch.cat([ids[:, torch.randperm(T - 1, generator=torch.Generator().manual_seed(3))], ids[:, -1:]], 1)
    without = build({"n_afrb": 0, "disable_attn": True, "disable_attn_mode": mode}, backbone)
    assert torch.equal(logits(without, ids)[:, -1], logits(without, permuted)[:, -1])
    with_attention = build({"n_afrb": 0}, backbone)
    assert not torch.allclose(logits(with_attention, ids)[:, -1], logits(with_attention, permuted)[:, -1])
    names = " ".join(n for n, _ in without.named_parameters())
    assert "attn" not in names and "q_proj" not in names


def test_layers_without_attention_are_what_the_specification_says():
    """h + MLP(norm(h)), and in mode identity h + norm(h) before it, written out for Llama."""
    for mode in ("zero", "identity"):
        model = build({"n_afrb": 0, "disable_attn": True, "disable_attn_mode": mode})
        source = build({"n_afrb": 0}).backbone.native  # the same seed: the same weights
        native: LlamaForCausalLM = source
        with torch.no_grad():
            h = native.model.embed_tokens(tokens())
            for layer, own in zip(native.model.layers, model.backbone.native.model.layers, strict=True):
                layer.load_state_dict({**layer.state_dict(), **own.state_dict()})
                if mode == "identity":
                    h = h + layer.input_layernorm(h)
                h = h + layer.mlp(layer.post_attention_layernorm(h))
            want = model.get_output_embeddings()(native.model.norm(h))
            native.model.embed_tokens.load_state_dict(model.get_input_embeddings().state_dict())
        close(logits(model, tokens()), want)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_attention_only_the_rows_asked_for_go_through_the_layers(backbone):
    model = open_up(build({"n_afrb": 1, "enable_pvm": True, "pvm_memory": "matrix", "disable_attn": True}, backbone))
    seen = []
    for module in model.backbone.modules():
        if isinstance(module, AttentionFreeLayer):
            module.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[1]))
    ids, rows = tokens(), torch.tensor([[3, 20, 39], [0, 17, 18]])
    whole = logits(model, ids)
    assert set(seen) == {T}
    seen.clear()
    close(logits(model, ids, readout_positions=rows), whole.gather(1, rows[..., None].expand(-1, -1, V)))
    assert set(seen) == {3}
    close(logits(model, ids, readout_positions=rows, diagnostics=True),
          whole.gather(1, rows[..., None].expand(-1, -1, V)))


@pytest.mark.parametrize("mode", ["trace", "state", "window", "matrix", "matrix, stepped head", "memory not read"])
def test_rows_are_rows_of_the_whole(mode):
    """`readout_positions` picks rows; labels are gathered there; the last ones come by `logits_to_keep` too."""
    model = open_up(build(mode))
    ids, labels = tokens(), tokens(seed=5)
    rows = torch.arange(T).expand(2, T) if mode == "matrix, stepped head" else torch.tensor([[3, 20, 39], [0, 17, 18]])
    whole = logits(model, ids)
    out = model(ids, labels=labels, readout_positions=rows, return_logits=True)
    close(out.logits, whole.gather(1, rows[..., None].expand(-1, -1, V)))
    wanted = labels.gather(1, rows)
    close(out.nll_sum, F.cross_entropy(out.logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    assert out.n_tokens == rows.numel() and out.n_correct == (out.logits.argmax(-1) == wanted).sum()
    if mode != "matrix, stepped head":  # whose head starts at the first row that is read
        close(logits(model, ids, logits_to_keep=3), whole[:, -3:])


@pytest.mark.parametrize("mode", ["trace", "matrix", "matrix, stepped head"])
def test_free_running_with_rows_equals_forward(mode):
    """The needle evaluation's way: the prefix with its last row read, then token by token."""
    model = open_up(build(mode))
    ids = tokens(length=30)
    rows = torch.arange(19, 30).expand(2, 11)
    whole = model(ids, readout_positions=rows, return_logits=True).logits
    out = model(ids[:, :20], readout_positions=torch.full((2, 1), 19), use_cache=True, return_logits=True)
    steps = [out.logits]
    for t in range(20, 30):
        out = model(ids[:, t:t + 1], readout_positions=torch.zeros(2, 1, dtype=torch.long), use_cache=True,
                    past_key_values=out.past_key_values, return_logits=True)
        steps.append(out.logits)
    close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("mode", ["state", "matrix", "matrix, delta, content, gate", "memory not read"])
def test_the_state_does_not_grow(mode):
    model = build(mode)
    sizes = []
    for length in (10, 40):
        out = model(tokens(length=length), use_cache=True)
        assert out.past_key_values.backbone is None and out.past_key_values.get_seq_length() == length
        sizes.append(out.past_key_values.numel())
    assert sizes[0] == sizes[1] and (mode != "state" or sizes[0] == 2 * 32)


@pytest.mark.parametrize("mode", ["state", "matrix, log clock, decay", "matrix, delta, content, gate"])
@torch.no_grad()
def test_padding_neither_writes_nor_decays(mode):
    """Memories after a padded row are those after its last real token."""
    model = open_up(build(mode))
    ids, real = tokens(length=20), 13
    mask = (torch.arange(20) < real).long().expand(2, 20)
    padded = model(ids, attention_mask=mask, use_cache=True).past_key_values
    bare = model(ids[:, :real], use_cache=True).past_key_values
    pairs = [(a.memory.sum, b.memory.sum) for a, b in zip(padded.blocks, bare.blocks, strict=True)
             if a.memory is not None]
    if model.memory is not None:
        pairs.append((padded.memory.matrix, bare.memory.matrix))
    assert pairs and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("mode", ["state", "window", "trace", "matrix, stepped head"])
def test_a_forward_changes_no_state_it_is_given(mode):
    model = open_up(build(mode))
    with torch.no_grad():
        state = model(tokens(length=10), use_cache=True).past_key_values
        before = copy.deepcopy(state)
        step = tokens(length=3, seed=2)
        first = model(step, past_key_values=state, use_cache=True, return_logits=True)
        second = model(step, past_key_values=before, use_cache=True, return_logits=True)
    assert torch.equal(first.logits, second.logits) and state.length == 10
    for module in model.modules():
        assert not any(isinstance(v, torch.Tensor) for v in vars(module).values())


@pytest.mark.parametrize("mode", ["state", "trace with attention, top states", "matrix, stepped head", "window",
                                  "matrix", "matrix, delta, content, gate"])
def test_generation(mode):
    """Greedy generation is forward's first choice each time, ignores left padding, and beams keep their own state."""
    model = open_up(build(mode))
    prompt = tokens(1, 6)
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if mode != "matrix, stepped head":  # its head starts where reading begins: at the prompt's end here
        assert torch.equal(model.generate(prompt, **options), expected)
    padded = torch.cat([tokens(1, 4, seed=3), prompt], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    plain = model.generate(prompt, **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], plain)
    beams = model.generate(prompt, num_beams=3, **options)
    cacheless = model.generate(prompt, num_beams=3, use_cache=False, **options)
    if mode != "matrix, stepped head":
        assert torch.equal(beams, cacheless)


@pytest.mark.parametrize("mode", ["embed, four cascaded blocks", "trace with attention, top states", "state",
                                  "learned query, write gate, ladder", "matrix, delta, content, gate"])
def test_checkpointing_changes_no_gradient_and_every_parameter_gets_one(mode):
    grads = []
    for checkpointing in (False, True):
        model = open_up(build(mode, ctx=BuildContext(seed=1, activation_checkpointing=checkpointing))).train()
        ids = tokens()
        documents = (torch.arange(T) > 11).long().expand(2, T)
        out = model(ids, labels=ids, document_ids=documents, negatives=tokens(length=7, seed=4),
                    controls={"rho_1": 0.5})
        (out.nll_sum + out.terms["nce"][0]).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
    for name, grad in grads[0].items():
        assert grad is not None, name
        close(grad, grads[1][name], atol=1e-5 * float(grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_backbone_is_frozen_and_gradients_pass_through_it(mode):
    model = build(mode).train()
    model(tokens(), labels=tokens(seed=1)).nll_sum.requires_grad or pytest.fail("nothing to train")
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model(tokens(), labels=tokens(seed=1)).nll_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    scale = [b.scale.grad for b in model.afrb_adapters]
    assert all(g.abs().max() > 0 for g in scale)


def test_frozen_parts_stay_to_the_bit_and_move_when_they_are_opened():
    """The hooks' schedule of the readout map: unchanged to step 99, moving from 100 on; its moments stay zero."""
    schedule = hooks("trace", kiss_ridge_calib=True)
    model = build("trace").train()
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    optimizer = torch.optim.AdamW([{"params": g.params, "weight_decay": g.weight_decay} for g in groups], lr=1e-2)
    project = model.readout.project
    before = project.detach().clone()
    for step in (0, 50, 99, 100):
        ids = tokens(1, 12, seed=step)
        model(ids, labels=ids, controls=schedule.controls(step)).nll_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(project, before) == (step < 100)
        assert bool(optimizer.state[project]["exp_avg"].any()) == (step >= 100)
    assert not torch.equal(model.afrb_adapters[0].scale, torch.zeros(32))


@pytest.mark.parametrize("mode", ["trace", "matrix"])
def test_infonce_is_its_definition(mode):
    """InfoNCE is its definition, written out, and knows rows without a label."""
    model = build(mode, backbone="llama")
    ids, labels, negatives = tokens(), tokens(seed=1) % 50, 50 + tokens(length=30, seed=2) % (V - 50)
    labels[:, ::3] = -100
    out = model(ids, labels=labels, negatives=negatives, diagnostics=True, controls={"infonce_tau": 0.2})
    total, count = out.terms["nce"]
    assert count == (labels != -100).sum() and out.terms["nce_correct"][1] == count
    table = whole_table(model.get_output_embeddings())
    said = out.diagnostics["readout"] @ (model.readout or model.memory).project.T
    scores = F.cosine_similarity(said[:, :, None], table, dim=-1) / 0.2
    want, correct = 0.0, 0
    for b, t in (labels != -100).nonzero().tolist():
        s = scores[b, t, torch.cat([labels[b, t:t + 1], negatives[b]])]
        want += (s.logsumexp(0) - s[0]).item()
        correct += int(s.argmax() == 0)
    assert total.item() == pytest.approx(want, rel=1e-5) and out.terms["nce_correct"][0] == correct


def test_infonce_chance_level():
    generator = torch.Generator().manual_seed(0)
    vectors, positive, negative = (torch.randn(64, n, 512, generator=generator) for n in (16, 16, 128))
    sums = infonce(vectors, positive, negative, torch.ones(64, 16, dtype=torch.bool), tau=0.2)
    assert float(sums.loss / sums.count) == pytest.approx(torch.log(torch.tensor(129.0)).item(), rel=0.02)
    assert float(sums.correct / sums.count) == pytest.approx(1 / 129, abs=0.01)


def test_switches_of_ablations():
    for mode in ("trace", "matrix"):
        model = open_up(build(mode))
        ids = tokens()
        plain = logits(model, ids)
        off = logits(model, ids, controls={"readout_off": 1.0})
        empty = logits(model, ids, controls={"memory_zero": 1.0})
        assert not torch.allclose(off, plain)
        for block in model.afrb_adapters:
            assert not torch.allclose(off, empty), "what a block takes in of its memory is part of the memory"
            block.kappa.change.data.fill_(-1000.0)
        close(logits(model, ids, controls={"readout_off": 1.0}), empty)
    unread = open_up(build("memory not read"))
    assert unread.evaluation_controls == {"memory_zero"}, "its block takes it in all the same"
    assert not torch.allclose(logits(unread, ids, controls={"memory_zero": 1.0}), logits(unread, ids))
    assert build().evaluation_controls == frozenset()
    stepped = open_up(build("matrix, stepped head"))
    moving, still = logits(stepped, ids), logits(stepped, ids, controls={"phase_freeze": 1.0})
    close(moving[:, 0], still[:, 0])
    assert not torch.allclose(moving[:, 1:], still[:, 1:])
    replaced = open_up(build("matrix", readout_replace=True))
    rows = torch.arange(T).expand(2, T)
    own = logits(replaced, ids, readout_positions=rows)
    close(own + logits(replaced, ids, controls={"readout_off": 1.0}), logits(replaced, ids), atol=1e-4)


def test_frequencies_stay_in_bounds_and_come_back():
    """At a bound, a gradient that leads inwards counts and one that leads outwards does not."""
    model = open_up(build({"adaptive_omega": True, "disable_attn": True}))
    omega = model.afrb_adapters[0].omega
    for outside, want in ((0.9, 6.4), (-0.9, 5.6)):
        omega.change.data.fill_(outside)
        grads = []
        for sign in (1.0, -1.0):
            omega.change.grad = None
            out = model(tokens(), diagnostics=True, return_logits=True)
            (sign * out.logits.square().sum()).backward()
            grads.append(float(omega.change.grad))
        assert float(out.diagnostics["omega"]) == pytest.approx(want)
        assert sorted(g != 0 for g in grads) == [False, True]
        assert sum(grads) * outside > 0, "a step against it leads back"


def test_ramps_reach_the_blocks():
    model = open_up(build({"n_afrb": 2, "phase_delta": 0.5, "disable_attn": True}))
    ids = tokens()
    results = [logits(model, ids, controls=c) for c in ({}, {"rho_1": 0.0}, {"rho_2": 0.0}, {"phase_ramp": 0.0})]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(logits(model, ids, controls={"rho_1": 1.0, "rho_2": 1.0, "phase_ramp": 1.0}), results[0])


@pytest.mark.parametrize("mode", ["trace with attention, top states", "matrix, delta, content, gate", "trace"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_save_and_load_keep_every_bit(mode, backbone, tmp_path):
    model = open_up(build(mode, backbone))
    whiten_tables(model)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).options["backbone"]["weights"] is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert torch.equal(logits(model, tokens()), logits(loaded, tokens()))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, buffer in half.named_buffers():
        assert not buffer.is_floating_point() or torch.equal(buffer, dict(model.named_buffers())[name]), name


@pytest.mark.parametrize("mode", ["conv mixer, two blocks", "matrix, delta, content, gate"])
def test_bf16_follows_fp32_and_phases_stay_exact(mode):
    wide = open_up(build(mode))
    narrow = copy.deepcopy(wide)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    ids = tokens()
    a, b = (m(ids, labels=ids, controls={"readout_off": 1.0}).nll_sum for m in (wide, narrow))
    assert b.dtype == torch.float32
    close(a, b, rtol=2e-2)
    theta = narrow(ids, diagnostics=True).diagnostics["theta"]
    assert torch.equal(theta, wide(ids, diagnostics=True).diagnostics["theta"]) and theta.dtype == torch.float64


def test_impossible_inputs_are_named():
    model = build("trace", "gpt2")
    with pytest.raises(ValueError, match="65 tokens, but the backbone has 64 positions"):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"document_ids has shape \(2, 3\)"):
        model(tokens(), document_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="readout_from is none"):
        build("memory not read")(tokens(), labels=tokens(), negatives=tokens(length=3))
    build({"disable_attn": True})(tokens(1, 200))  # Llama's layers without attention know no positions
    assert config({"disable_attn": True}).max_seq_len is None and config().max_seq_len == 64


def test_what_is_read_out_is_returned_with_the_state():
    model = build("matrix")
    ids = tokens(length=20)
    whole, _ = model.get_pvm_readout(ids)
    _, state = model.get_pvm_readout(ids[:, :12])
    rest, _ = model.get_pvm_readout(ids[:, 12:], state)
    close(rest, whole)
    assert whole.shape == (2, 8)
    with pytest.raises(ValueError, match="no memory is read out"):
        build().get_pvm_readout(ids)
