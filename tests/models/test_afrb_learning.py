"""A matrix memory learns to find needles, by phase alone, or finds them untrained, or calibrated."""

from __future__ import annotations

import copy

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.models.afrb.calibration import fit_readout, set_readout, whiten_tables
from tests.models.afrb_small import Alone, build


def needles(rows, length, pool, generator):
    """Ids [rows, length + 22] of contexts with a key and 16 needle tokens, [SEP, fixed, key], needle."""
    found = []
    for _ in range(rows):
        order = torch.randperm(pool, generator=generator)
        context = order[20:][torch.randint(0, pool - 20, (length,), generator=generator)]
        start = int(torch.randint(length // 4, 3 * length // 4 - 19, (1,), generator=generator))
        context[start:start + 20] = order[:20]
        found.append(torch.cat([context + 8, torch.tensor([1, 2]), order[:20] + 8]))
    return torch.stack(found)


@torch.no_grad()
def hit_rate(model, ids, first):
    """Greedy and free-running, 16 tokens from `first` on."""
    out = model(ids[:, :first], readout_positions=torch.full((len(ids), 1), first - 1), use_cache=True,
                return_logits=True)
    answers = [out.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(15):
        out = model(answers[-1], readout_positions=torch.zeros(len(ids), 1, dtype=torch.long), use_cache=True,
                    past_key_values=out.past_key_values, return_logits=True)
        answers.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return float((torch.cat(answers, 1) == ids[:, first:]).float().mean())


def memory_of_needles(clock, start="random"):
    """A one-layer Llama with random frozen tables of 1,032 tokens and a memory of 128 x 128."""
    backbone = {"model_type": "llama", "vocab_size": 1032, "hidden_size": 128, "num_hidden_layers": 1,
                "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
                "tie_word_embeddings": False}
    model = build({
        "backbone": {"hf_config": backbone}, "n_afrb": 0, "disable_attn": True, "enable_pvm": True, "pvm_dk": 128,
        "pvm_dv": 128, "pvm_memory": "matrix", "pvm_init": start, "pvm_phase_clock": clock, "pvm_scale": 30.0})
    whiten_tables(model)
    return model


@pytest.mark.parametrize(("clock", "low", "high"), [("token", 0.9, 1.0), ("none", 0.0, 0.05)])
def test_a_memory_learns_to_find_needles_and_does_so_by_phase(clock, low, high):
    """From random maps, 100 steps; without the turning of tokens it does not learn it (research note, section 8)."""
    model = memory_of_needles(clock)
    generator, test = torch.Generator().manual_seed(0), needles(50, 128, 1024, torch.Generator().manual_seed(9))
    first = 128 + 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    assert hit_rate(model, test, first) < 0.01
    for step in range(100):
        ids = needles(16, 128, 1024, generator)
        rows = torch.arange(first - 1, first + 15).expand(16, -1)
        out = model(ids[:, :-1], labels=ids[:, 1:], readout_positions=rows)
        (out.nll_sum / out.n_tokens).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert low <= hit_rate(model, test, first) <= high


def test_structured_maps_find_needles_before_any_training_and_controls_do_not():
    model, test = memory_of_needles("token", "structured"), needles(30, 128, 1024, torch.Generator().manual_seed(3))
    assert hit_rate(model, test, 134) > 0.95
    other_key, other_needle = copy.deepcopy(test), copy.deepcopy(test)
    other_key[:, 130:134] = 8 + (other_key[:, 130:134] - 8 + 511) % 1024
    other_needle[:, 134:] = 8 + (other_needle[:, 134:] - 8 + 511) % 1024
    assert hit_rate(model, other_key, 134) < 0.02 and hit_rate(model, other_needle, 134) < 0.02
    assert hit_rate(memory_of_needles("none", "structured"), test, 134) < 0.05


def test_a_random_memory_is_calibrated_to_find_needles():
    """Random maps but P, which ridge regression fits to 2,048 pairs, no gradient (research note, section 6)."""
    model = memory_of_needles("token")

    class Needles(Alone):
        def train_samples(self, n):
            ids = needles(n, 128, 1024, torch.Generator().manual_seed(1))
            return Batch(torch.arange(n), {"input_ids": ids[:, :-1], "labels": ids[:, 1:],
                                           "readout_positions": torch.arange(133, 149).expand(n, -1)})

    test = needles(30, 128, 1024, torch.Generator().manual_seed(3))
    model.schema = model.schema.model_copy(update={"kiss_ridge_max_pairs": 2048})
    assert hit_rate(model, test, 134) < 0.01
    fit = fit_readout(model, Needles(model))
    set_readout(model, Needles(model), fit)
    assert fit.r2_heldout > 0.01
    assert hit_rate(model, test, 134) > 0.3
