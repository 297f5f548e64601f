"""Hidden tokens: how many, what stands in their place, and that nothing but seed and place in the run decides it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.objective import MaskedLMConfig
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError
from pretrain.models.base import LMOutput
from pretrain.objectives.base import SumObjective
from pretrain.objectives.masked_lm import MaskedLM

V, T, MASK, SPECIAL = 200, 64, 5, (0, 1, 2)


def objective(**changes):
    values = {"mask_id": MASK, "special_ids": SPECIAL, "vocab_size": V}
    return MaskedLM(MaskedLMConfig.model_validate({**values, **changes}))


def windows(rows=64, first=0):
    g = torch.Generator().manual_seed(first)
    return Batch(torch.arange(first, first + rows), {
        "input_ids": torch.randint(0, V, (rows, T), generator=g),
        "document_ids": torch.zeros(rows, T, dtype=torch.int32)})


def hidden(batch, **changes):
    return objective(**changes).probe_inputs(batch)


def test_fifteen_in_a_hundred_are_chosen_and_four_fifths_of_them_masked():
    """Within four standard deviations."""
    batch = windows(1024)
    found = hidden(batch)
    tokens, labels, shown = batch["input_ids"], found["labels"], found["input_ids"]
    chosen = labels != -100
    plain = ~torch.isin(tokens, torch.tensor([*SPECIAL, MASK]))
    assert not (chosen & ~plain).any()
    count, n = int(plain.sum()), int(chosen.sum())
    assert n == pytest.approx(0.15 * count, abs=4 * (0.15 * 0.85 * count)**0.5)
    assert torch.equal(labels[chosen], tokens[chosen]) and torch.equal(shown[~chosen], tokens[~chosen])
    masked, kept = int((shown[chosen] == MASK).sum()), int((shown[chosen] == tokens[chosen]).sum())
    assert masked == pytest.approx(0.8 * n, abs=4 * (0.16 * n)**0.5)
    assert kept == pytest.approx((0.1 + 0.1 / V) * n, abs=4 * (0.09 * n)**0.5)
    replaced = shown[chosen & (shown != MASK) & (shown != tokens)]
    assert not torch.isin(replaced, torch.tensor([*SPECIAL, MASK])).any()
    allowed = replaced.bincount(minlength=V)[[i for i in range(V) if i not in (*SPECIAL, MASK)]]
    expected = len(replaced) / len(allowed)
    assert ((allowed - expected).square() / expected).mean() < 1.5  # chi-squared a degree of freedom


def test_only_seed_and_place_decide():
    batch = windows(16)
    whole = hidden(batch)
    parts = [hidden(batch.rows(at, at + 4)) for at in range(0, 16, 4)]
    for name in ("input_ids", "labels"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    again = Batch(batch.sample_ids + 16, batch.tensors)  # the same windows an epoch later
    assert not torch.equal(hidden(again)["labels"], whole["labels"])
    assert not torch.equal(hidden(batch, seed=1)["labels"], whole["labels"])


def test_counts_are_what_the_forward_sums_over():
    made = objective()
    assert isinstance(made, SumObjective)
    batch = windows(8)
    seen = {}

    def model(controls, **inputs):
        seen.update(inputs)
        n = (inputs["labels"] != -100).sum()
        return LMOutput(nll_sum=2.0 * n, n_tokens=n, n_correct=n // 2)
    result = made(model, batch, {})
    count = made.counts(batch)["mlm"]
    assert 0 < count == int(seen["labels"].ne(-100).sum())
    assert result.sums["mlm"].item() == 2.0 * count
    assert torch.equal(seen["document_ids"], batch["document_ids"])


def test_pairs_give_their_positives_and_padding_is_never_hidden():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[10], [64], [3]])
    tokens = torch.randint(6, V, (3, T), generator=g)
    batch = Batch(torch.arange(3), {"query_input_ids": tokens, "positive_input_ids": tokens,
                                    "positive_attention_mask": mask})
    found = hidden(batch, rate=0.9)
    assert set(found) == {"input_ids", "attention_mask", "labels"}
    chosen = found["labels"] != -100
    assert not (chosen & ~mask).any() and chosen.sum() > 0.7 * mask.sum()


def test_impossible_shares_are_refused():
    for values, cure in (({"mask_share": 0.95}, "more than 1 together"),
                         ({"vocab_size": 3, "special_ids": (0, 1, 2)}, "leave no token")):
        with pytest.raises((ConfigError, ValidationError), match=cure):
            MaskedLMConfig.model_validate({"mask_id": 2, **values})
