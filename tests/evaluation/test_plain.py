"""Plain transformers models: each document as if it stood alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from evaluation.plain import PlainCausalLM

V = 50


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=64))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64))


@pytest.fixture(params=[llama, gpt2])
def native(request):
    torch.manual_seed(0)
    model = request.param().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def slow(native, ids, labels, documents):
    """One forward a document; sums in double."""
    nll, tokens, correct = 0.0, 0, 0
    logits = torch.zeros(*ids.shape, V)
    for b in range(ids.shape[0]):
        for d in documents[b].unique():
            place = documents[b] == d
            out = native(ids[b, place][None]).logits[0]
            logits[b, place] = out
            kept = labels[b, place] >= 0
            chances = torch.log_softmax(out.double(), -1)[kept]
            wanted = labels[b, place][kept]
            nll -= float(chances[torch.arange(len(wanted)), wanted].sum())
            tokens += len(wanted)
            correct += int((chances.argmax(-1) == wanted).sum())
    return nll, tokens, correct, logits


@torch.no_grad()
def test_documents_equal_documents_alone(native):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (3, 40), generator=g)
    documents = (torch.rand(3, 40, generator=g) < 0.12).cumsum(1)
    labels = torch.where(torch.rand(3, 40, generator=g) < 0.8, torch.randint(0, V, (3, 40), generator=g), -100)
    out = PlainCausalLM(native)(ids, labels, documents, return_logits=True)
    nll, tokens, correct, logits = slow(native, ids, labels, documents)
    assert float(out.nll_sum) == pytest.approx(nll, rel=1e-5)
    assert (int(out.n_tokens), int(out.n_correct)) == (tokens, correct)
    torch.testing.assert_close(out.logits, logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_without_documents_a_row_is_one_and_padding_is_apart(native):
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(2))
    model = PlainCausalLM(native)
    torch.testing.assert_close(model(ids, return_logits=True).logits, native(ids).logits)
    for side in (slice(0, 6), slice(14, 20)):
        mask = torch.ones_like(ids)
        mask[:, side] = 0
        got = model(ids, attention_mask=mask, return_logits=True).logits[mask.bool()]
        expected = native(ids[mask.bool()].view(2, 14)).logits.reshape(28, V)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_decoding_with_the_cache_equals_one_forward(native):
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(3))
    model = PlainCausalLM(native)
    out = model(ids[:, :5], use_cache=True, return_logits=True)
    steps = [out.logits]
    for t in range(5, 12):
        out = model(ids[:, t:t + 1], past_key_values=out.past_key_values, use_cache=True, return_logits=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, return_logits=True).logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="single documents"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)
