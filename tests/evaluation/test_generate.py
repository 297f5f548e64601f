"""The decoding loop on two toy models: one with a cache that checks how it is used, one without."""

from types import SimpleNamespace

import pytest
import torch

from evaluation.generate import Limits, generate
from evaluation.sampling import Sampling
from pretrain.errors import UserError

V, D = 31, 16


class Toy:
    """A recurrent model whose logits depend on every earlier token; its cache is the hidden state [B, D]."""

    def __init__(self, cached=True, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.embed, self.head = torch.randn(V, D, generator=g).double(), torch.randn(D, V, generator=g).double() * 2
        self.mix = torch.linalg.qr(torch.randn(D, D, generator=g).double()).Q
        self.cached, self.calls = cached, []

    def __call__(self, *, input_ids, past_key_values, use_cache, return_logits):
        assert use_cache and return_logits
        self.calls.append(tuple(input_ids.shape))
        h = torch.zeros(input_ids.shape[0], D).double() if past_key_values is None else past_key_values
        outs = []
        for t in range(input_ids.shape[1]):
            h = torch.tanh(h @ self.mix + self.embed[input_ids[:, t]])
            outs.append(h @ self.head)
        return SimpleNamespace(logits=torch.stack(outs, 1), past_key_values=h if self.cached else None)


def run(model, prompts, limits, sampling, **more):
    return generate(model, prompts, limits, sampling, vocab_size=V, device=torch.device("cpu"), **more)


def slow_greedy(model, prompt, limits):
    """One text, whole forward each time."""
    text = list(prompt)
    for _ in range(limits.max_new_tokens):
        if limits.max_seq_len and len(text) >= limits.max_seq_len:
            break
        logits = model(input_ids=torch.tensor([text]), past_key_values=None, use_cache=True, return_logits=True).logits
        text.append(int(logits[0, -1].argmax()))
        if text[-1] == limits.eos_id:
            break
    return text[len(prompt):]


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [4]]


@pytest.mark.parametrize("limits", [Limits(12), Limits(12, eos_id=5), Limits(40, max_seq_len=16), Limits(0)])
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_batch_equals_each_text_alone(limits, cached):
    got = run(Toy(cached), PROMPTS, limits, Sampling(temperature=0))
    assert got == [slow_greedy(Toy(), p, limits) for p in PROMPTS]


def test_eos_ends_a_text_and_is_kept():
    free = run(Toy(), PROMPTS, Limits(30), Sampling(temperature=0))
    eos = free[0][7]
    stopped = run(Toy(), PROMPTS, Limits(30, eos_id=eos), Sampling(temperature=0))
    for whole, part in zip(free, stopped, strict=True):
        cut = whole.index(eos) + 1 if eos in whole else len(whole)
        assert part == whole[:cut]


def test_a_sampled_text_does_not_depend_on_its_batch():
    sampling, limits = Sampling(temperature=1.3, top_k=20, top_p=0.98, repetition_penalty=1.2, seed=9), Limits(25)
    together = run(Toy(), PROMPTS, limits, sampling)
    for i, prompt in enumerate(PROMPTS):
        assert run(Toy(), [prompt], limits, sampling, sample_ids=[i]) == [together[i]]
    back = run(Toy(), PROMPTS[::-1], limits, sampling, sample_ids=[4, 3, 2, 1, 0])
    assert back[::-1] == together
    assert together[1] != together[4], "equal prompts with different ids are different samples"
    assert run(Toy(), PROMPTS, limits, Sampling(temperature=1.3, seed=10)) != together


def test_the_cache_is_fed_each_token_once():
    model = Toy()
    run(model, PROMPTS, Limits(5), Sampling(seed=1))
    assert model.calls[0] == (5, 1) and all(shape == (5, 1) for shape in model.calls)
    assert len(model.calls) == 7 + 5 - 1
    model = Toy()
    run(model, [[1, 2, 3]], Limits(5), Sampling(seed=1))
    assert model.calls == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_fixed_length_makes_the_same_number_of_forwards_whatever_is_drawn():
    counts = set()
    for seed in range(6):
        model = Toy()
        run(model, [[1]], Limits(30, eos_id=3, fixed_length=True), Sampling(temperature=3.0, seed=seed))
        counts.add(len(model.calls))
    assert counts == {30}


def test_extra_vocabulary_rows_are_never_drawn():
    model = Toy()
    model.head[:, 20:] += 100.0
    drawn = generate(model, [[1]] * 8, Limits(20), Sampling(temperature=5.0), vocab_size=20, device=torch.device("cpu"))
    assert max(max(text) for text in drawn) < 20


@pytest.mark.parametrize(("prompts", "match"), [([[1], []], "prompt 1"), ([[V]], "0 to 30"), ([[1] * 16], "takes 16")])
def test_bad_prompts_are_named(prompts, match):
    with pytest.raises(UserError, match=match):
        run(Toy(), prompts, Limits(4, max_seq_len=16), Sampling())
