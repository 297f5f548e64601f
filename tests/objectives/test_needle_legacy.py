"""The artefact behind the published figure: the unshifted loss makes a model without memory echo, and retrieve nothing.

One pair of runs that differ in `legacy_loss` alone; figures of the same evaluation that users run.
"""

import numpy as np
import pytest
import torch

from evaluation.needle import Answers, ask, nulls
from evaluation.needle_reader import Reader
from pretrain.config.needle import NeedleConfig
from pretrain.config.objective import NeedleObjectiveConfig
from pretrain.data.batch import Batch
from pretrain.data.needle import NeedleSource
from pretrain.data.open import eval_batches
from pretrain.metrics.needle import Rate, needle_rates
from pretrain.models.afrb.family import build
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.base import BuildContext
from pretrain.objectives.needle import Needle

LLAMA = {"model_type": "llama", "vocab_size": 328, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "tie_word_embeddings": False}
TASK = {"vocab_size": 328, "ctx_chunk_len": 8, "needle_len": 8, "needle_eval_examples": 50}


def rates(legacy: bool) -> dict[str, Rate]:
    """Of a token-wise null adapter after 150 steps of 16 examples."""
    model = build(AFRBConfig.model_validate({"backbone": {"hf_config": LLAMA}, "phase_mode": "none",
                                             "disable_attn": True, "layerscale_init": 0.1}), BuildContext(seed=1))
    weights = {"legacy_loss": True, "lambda_retrieval": 0.5} if legacy else {}
    objective = Needle(NeedleObjectiveConfig.model_validate(weights))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    source = NeedleSource(NeedleConfig.model_validate(TASK))
    for step in range(150):
        ids = np.arange(step * 16, step * 16 + 16)
        batch = Batch(torch.from_numpy(ids), source.get(ids).tensors)
        counts = objective.counts(batch)
        sums = objective(model, batch, {}).sums
        loss = sum(objective.terms[name] * sums[name] / counts[name] for name in sums)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    val = NeedleSource(NeedleConfig.model_validate({**TASK, "split": "val"}))
    reader = Reader(model.eval(), torch.device("cpu"), readout=True)
    answers = Answers.of(ask(reader, eval_batches(val, rank=0, world=1, batch_size=25), val.config))
    return needle_rates(answers.predictions, 5)


@pytest.mark.slow
def test_the_unshifted_loss_teaches_an_echo_and_no_retrieval():
    legacy, corrected = rates(legacy=True), rates(legacy=False)
    echo, elsewhere = legacy["needle_echo_rate"].value, legacy["echo_rate_haystack"].value
    assert echo > 0.5
    assert echo == pytest.approx(elsewhere, abs=0.15), "wherever it looks"
    assert corrected["needle_echo_rate"].value < 0.05
    chance = nulls(NeedleConfig.model_validate(TASK)).context_bag
    for found in (legacy, corrected):
        assert found["needle_hit_rate"].at_chance(chance), "no more than any id of the context"
        assert found["needle_exact_match"].value == 0.0
