"""InfoNCE of a memory on language: at which tokens it is asked, against what, and that it is its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.config.objective import CausalLMConfig
from pretrain.data.batch import Batch
from pretrain.objectives.causal_lm import CausalLM
from tests.models.afrb_small import T, V, build, open_up, tokens, whole_table

OPTIONS = {"infonce_weight": 0.3, "infonce_positions": 7, "infonce_negatives": 20, "infonce_tau": 0.2}


def batch_of(first: int) -> Batch:
    labels = tokens(seed=first + 1)
    labels[:, ::5] = -100
    return Batch(torch.arange(first, first + len(labels)), {"input_ids": tokens(seed=first), "labels": labels})


def spied(model, batch: Batch, **options):
    """(result of the objective, arguments of the model's forward)."""
    seen = {}

    def forward(**inputs):
        seen.update(inputs)
        return model(**inputs)
    return CausalLM(CausalLMConfig(**{**OPTIONS, **options}))(forward, batch, {}), seen


def test_tokens_and_negatives_depend_on_the_sample_alone():
    """The same in any batch, on any rank and after a resume; tokens of a sample differ, samples draw for themselves."""
    model = build("trace")
    _, whole = spied(model, batch_of(10))
    _, single = spied(model, Batch(torch.tensor([11]), {k: v[1:] for k, v in batch_of(10).tensors.items()}))
    for name in ("nce_positions", "negatives"):
        assert torch.equal(single[name], whole[name][1:])
        assert not torch.equal(whole[name][0], whole[name][1])
    assert all(len(set(row)) == 7 and min(row) >= 0 and max(row) < T for row in whole["nce_positions"].tolist())
    assert not torch.equal(spied(model, batch_of(10), infonce_seed=1)[1]["negatives"], whole["negatives"])
    assert spied(model, batch_of(10), infonce_positions=4096)[1]["nce_positions"].tolist() == [list(range(T))] * 2


@pytest.mark.parametrize("mode", ["trace", "matrix"])
def test_it_is_its_definition_beside_the_whole_loss_of_language(mode):
    model, batch = open_up(build(mode)), batch_of(3)
    objective = CausalLM(CausalLMConfig(**OPTIONS))
    found, seen = spied(model, batch)
    plain = CausalLM(CausalLMConfig())(model, batch, {})
    assert torch.equal(found.sums["nll"], plain.sums["nll"])
    with torch.no_grad():
        read = model(batch["input_ids"], diagnostics=True).diagnostics["readout"]
        said = read @ (model.readout or model.memory).project.T
    table = whole_table(model.get_output_embeddings())
    scores = F.cosine_similarity(said[:, :, None], table, dim=-1) / 0.2
    want, count = 0.0, 0
    for b in range(2):
        for t in seen["nce_positions"][b].tolist():
            positive = int(batch["labels"][b, t])
            if positive == -100:
                continue
            others = [int(n) % V for n in seen["negatives"][b] if int(n) % V != positive]
            s = scores[b, t, torch.tensor([positive, *others])]
            want, count = want + float(s.logsumexp(0) - s[0]), count + 1
    assert objective.counts(batch) == {"nll": int((batch["labels"] != -100).sum()), "nce": count}
    assert float(found.sums["nce"]) == pytest.approx(want, rel=1e-4)
    assert float(found.metrics["infonce_loss"][1]) == count
    assert np.isclose(objective.terms["nce"], 0.3)
    found.sums["nce"].backward()
    assert (model.readout or model.memory).project.grad.abs().max() > 0
