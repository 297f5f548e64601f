"""Clean models pass every gate; each planted leak fails the gate that is there for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.gates import run_gates
from pretrain.models.base import BuildContext, EncoderOutput, LMOutput
from pretrain.models.baseline.family import FAMILY
from pretrain.models.baseline.model import BaselineEncoder, BaselineForCausalLM, hf_config
from pretrain.models.baseline.schema import BaselineConfig

V, T = 64, 48
CPU = torch.device("cpu")


def config(body="llama", **changes):
    return BaselineConfig(body=body, vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
                          max_position_embeddings=64, initializer_range=0.1, **changes)


def build(cls, body="llama", *, seed=0, document_masking=True, **changes):
    torch.manual_seed(seed)
    return cls._from_config(hf_config(config(body, **changes), document_masking=document_masking))


def failed(model):
    return {r.name for r in run_gates(model, vocab_size=V, seq_len=T, seed=1, device=CPU) if not r.passed}


@pytest.mark.parametrize("body", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_baselines_pass_every_gate(body, attention, monkeypatch):
    monkeypatch.setattr("pretrain.models.baseline.model.QUERY_BLOCK", 20)
    cls = BaselineEncoder if body == "bert" else BaselineForCausalLM
    model = build(cls, body, num_kv_heads=2 if body == "llama" else None)
    model.set_attn_implementation(attention)
    results = run_gates(model, vocab_size=V, seq_len=T, seed=1, device=CPU)
    assert all(r.passed for r in results), results
    assert len(results) == (3 if body == "bert" else 6)


def test_a_model_trained_on_random_tokens_passes():
    """It learns the training tokens by heart and still cannot foresee fresh ones."""
    model = build(BaselineForCausalLM)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, V, (4, T + 1), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        out = model(tokens[:, :-1], labels=tokens[:, 1:])
        (out.nll_sum / out.n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.nll_sum.item() / out.n_tokens < 1.5
    assert failed(model) == set()


class Bidirectional(BaselineForCausalLM):
    """Attends to the whole document."""

    def _masking(self, *args, causal, **kwargs):
        return super()._masking(*args, causal=False, **kwargs)


class SeesNextToken(BaselineForCausalLM):
    """A convolution over embeddings that reaches one place too far, as faint as `strength`."""

    strength = 0.01

    def forward(self, input_ids, **kwargs):
        def mix(module, inputs, output):
            return output + self.strength * F.pad(output, (0, 0, 0, 1))[:, 1:]
        handle = self.get_input_embeddings().register_forward_hook(mix)
        try:
            return super().forward(input_ids, **kwargs)
        finally:
            handle.remove()


class SeesNextTokenBehindAGate(SeesNextToken):
    """The same behind a gate that starts closed."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(1))

    @property
    def strength(self):
        return self.gate


class PlainCall(BaselineForCausalLM):
    """What transformers does by default: ids of documents are not looked at."""

    def forward(self, input_ids, labels=None, document_ids=None, past_key_values=None, use_cache=False,
                return_logits=False, controls=None):
        out = self.native(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)
        nll = None if labels is None else F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return LMOutput(nll_sum=nll, logits=out.logits, past_key_values=out.past_key_values)


class PositionsGoOn(BaselineForCausalLM):
    """Masks documents but counts positions through the window."""

    def _masking(self, *args, **kwargs):
        return super()._masking(*args, **kwargs)._replace(position_ids=None)


class ForgetsTheCache(BaselineForCausalLM):
    """Takes a cache and does not use it."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class ShiftedCache(BaselineForCausalLM):
    """Decodes one position off (learned positions, so that it matters)."""

    def _masking(self, input_ids, *args, past=0, **kwargs):
        masking = super()._masking(input_ids, *args, past=past, **kwargs)
        return masking._replace(position_ids=torch.tensor([[past - 1]])) if past else masking


class KnowsTheLabel(BaselineForCausalLM):
    """Helps the loss, not the logits, with an embedding of the label."""

    def forward(self, input_ids, labels=None, **kwargs):
        out = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            out["nll_sum"] = out.nll_sum - 0.01 * labels.numel()
        return out


class CopiesTheNextToken(BaselineForCausalLM):
    """What training makes of a leak: the next input is the label, and the model has learned to say it."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = super().forward(input_ids, **{**kwargs, "return_logits": True}).logits
        logits = logits + 2.0 * F.one_hot(F.pad(input_ids[:, 1:], (0, 1)), V)
        nll = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return LMOutput(nll_sum=nll, logits=logits)


class CentredOverTheBatch(BaselineForCausalLM):
    """Subtracts the mean of the batch from the logits."""

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids, **kwargs)
        if out.logits is not None and len(out.logits) > 1:
            out["logits"] = out.logits - 0.1 * out.logits.mean(0, keepdim=True)
        return out


class ScaledByTheWindow(BaselineForCausalLM):
    """Logits depend on how long the window is, padding included."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        out = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if out.logits is not None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length() - input_ids.shape[1]
            out["logits"] = out.logits * (1 + (past + input_ids.shape[1]) / 100)
        return out


class Constant(BaselineForCausalLM):
    """Says the same whatever it is given."""

    def forward(self, input_ids, **kwargs):
        return super().forward(torch.zeros_like(input_ids), **kwargs)


LEAKS = [
    (Bidirectional, "llama", {}, {"causality"}),
    (SeesNextToken, "llama", {}, {"causality"}),
    (SeesNextTokenBehindAGate, "gpt2", {}, {"causality"}),
    (PlainCall, "llama", {}, {"documents"}),
    (PlainCall, "gpt2", {}, {"documents"}),
    (BaselineForCausalLM, "llama", {"document_masking": False}, {"documents"}),
    (PositionsGoOn, "gpt2", {}, {"documents"}),
    (ForgetsTheCache, "llama", {}, {"decode"}),
    (ShiftedCache, "gpt2", {}, {"decode"}),
    (KnowsTheLabel, "llama", {}, {"random_tokens"}),
    (CopiesTheNextToken, "llama", {}, {"causality", "random_tokens"}),
    (CentredOverTheBatch, "llama", {}, {"batch"}),
    (ScaledByTheWindow, "llama", {}, {"padding"}),
    (Constant, "llama", {}, {"causality"}),
]


@pytest.mark.parametrize(("cls", "body", "options", "expected"), LEAKS, ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_leak_fails_its_gate(cls, body, options, expected):
    assert expected <= failed(build(cls, body, **options))


class PoolsOverPadding(BaselineEncoder):
    """The mean takes padding along."""

    def forward(self, input_ids, attention_mask=None, document_ids=None, controls=None):
        out = super().forward(input_ids, attention_mask, document_ids)
        return EncoderOutput(heads={"mean": out.aux["token_states"].mean(1)}, default="mean", aux=out.aux)


class AttendsToPadding(BaselineEncoder):
    """The mask reaches the pooling only."""

    def _masking(self, input_ids, document_ids, attention_mask, **kwargs):
        return super()._masking(input_ids, document_ids, None, **kwargs)


class NormalisesOverTheBatch(BaselineEncoder):
    """Heads are centred over the batch."""

    def forward(self, input_ids, attention_mask=None, document_ids=None, controls=None):
        out = super().forward(input_ids, attention_mask, document_ids)
        return EncoderOutput(heads={k: h - h.mean(0) for k, h in out.heads.items()}, default="mean", aux=out.aux)


@pytest.mark.parametrize(("cls", "options", "expected"), [
    (PoolsOverPadding, {}, {"padding"}), (AttendsToPadding, {}, {"padding"}), (NormalisesOverTheBatch, {}, {"batch"}),
    (BaselineEncoder, {"document_masking": False}, {"documents"})], ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_leak_of_an_encoder_fails_its_gate(cls, options, expected):
    assert expected <= failed(build(cls, "bert", **options))


def test_not_a_number_never_passes():
    model = build(BaselineForCausalLM)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    assert failed(model) == {"causality", "padding", "documents", "decode", "batch", "random_tokens"}


def test_the_model_is_as_before():
    model = FAMILY.build(config("gpt2"), BuildContext())
    model.train()
    model.native.transformer.h[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    run_gates(model, vocab_size=V, seq_len=T, seed=1, device=CPU)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())


def test_half_precision_models_are_probed_in_fp32():
    model = FAMILY.build(config(), BuildContext(dtype=torch.bfloat16))
    assert failed(model) == set()
    assert model.dtype == torch.bfloat16


def test_an_unknown_output_is_refused():
    class Tuple(BaselineForCausalLM):
        def forward(self, input_ids, **kwargs):
            return (input_ids,)
    with pytest.raises(TypeError, match="neither LMOutput nor EncoderOutput"):
        failed(build(Tuple))
