"""The needle objective on models whose answers are known: terms, counts, negatives, the original's unshifted loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.config.needle import NeedleConfig
from pretrain.config.objective import NeedleObjectiveConfig
from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.needle import NeedleSource
from pretrain.models.base import LMOutput
from pretrain.objectives.base import SumObjective
from pretrain.objectives.needle import Needle, draw_negatives, unshifted

V = 300
SOURCE = NeedleSource(NeedleConfig(vocab_size=V, ctx_chunk_len=24, needle_len=4, needle_marker="key"))


def batch(first: int, count: int) -> Batch:
    return Batch(torch.arange(first, first + count), SOURCE.get(np.arange(first, first + count)).tensors)


class Model:
    """A token-wise table of logits; remembers what it was called with."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.calls = table, []

    def __call__(self, input_ids, labels, readout_positions, negatives=None, controls=None) -> LMOutput:
        self.calls.append({"input_ids": input_ids, "labels": labels, "readout_positions": readout_positions,
                           "negatives": negatives, "controls": controls})
        rows = self.table[input_ids.gather(1, readout_positions)]
        wanted = labels.gather(1, readout_positions)
        nll = F.cross_entropy(rows.flatten(0, 1), wanted.flatten(), reduction="sum")
        terms = None
        if negatives is not None:
            ids = torch.cat([wanted[:, :, None], negatives[:, None, :].expand(-1, wanted.shape[1], -1)], dim=2)
            scores = rows.gather(2, ids) / controls["infonce_tau"]
            n = torch.tensor(wanted.numel())
            terms = {"nce": (-scores.log_softmax(-1)[..., 0].sum(), n),
                     "nce_correct": ((scores.argmax(-1) == 0).sum(), n)}
        return LMOutput(nll_sum=nll, n_tokens=torch.tensor(wanted.numel()), n_correct=(rows.argmax(-1) == wanted).sum(),
                        terms=terms)


def objective(**fields) -> Needle:
    return Needle(NeedleObjectiveConfig(**fields))


def test_terms_follow_the_weights():
    assert isinstance(objective(), SumObjective)
    assert objective().terms == {"lm": 1.0}
    full = objective(infonce_weight=0.3, lambda_retrieval=0.5)
    assert full.terms == {"lm": 1.0, "nce": 0.3, "ret": 0.5}
    assert full.counts(batch(0, 3)) == {"lm": 12, "nce": 12, "ret": 12}
    model = Model(torch.randn(V, V, generator=torch.Generator().manual_seed(0)))
    result = full(model, batch(0, 3), {"ramp": 0.5})
    assert result.sums["ret"] is result.sums["lm"]
    assert len(model.calls) == 1
    assert model.calls[0]["controls"] == {"ramp": 0.5, "infonce_tau": 0.08}
    assert set(result.metrics) == {"lm_loss", "accuracy", "infonce_loss", "infonce_acc", "retrieval_loss"}
    assert float(result.metrics["lm_loss"][1]) == 12


def test_sums_do_not_depend_on_how_the_batch_is_split():
    model = Model(torch.randn(V, V, generator=torch.Generator().manual_seed(0)))
    goal = objective(infonce_weight=1.0)
    whole = goal(model, batch(40, 6), {}).sums
    parts = [goal(model, batch(40 + at, 2), {}).sums for at in (0, 2, 4)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts))


def test_negatives_are_of_the_pool_and_never_the_answer():
    examples = batch(0, 50)
    drawn = draw_negatives(examples, 256, key=1)
    low, high = SOURCE.config.pool_low, SOURCE.config.pool_high
    answer = examples["labels"].gather(1, examples["readout_positions"])
    assert drawn.shape == (50, 256)
    assert not (drawn[:, :, None] == answer[:, None, :]).any()
    assert drawn.min() == low
    assert drawn.max() == high - 1
    counts = torch.bincount(drawn.flatten() - low, minlength=high - low).double()
    left = 50 - torch.bincount(answer.flatten() - low, minlength=high - low).double()
    expected = left / left.sum() * drawn.numel()
    assert float(((counts - expected) ** 2 / expected).sum()) < 150, "chi-square of 99 degrees of freedom"


def test_negatives_change_with_sample_and_seed_only():
    assert torch.equal(draw_negatives(batch(0, 6), 16, 1)[2:4], draw_negatives(batch(2, 2), 16, 1))
    again = Batch(torch.arange(1000, 1006), batch(0, 6).tensors)
    assert not torch.equal(draw_negatives(batch(0, 6), 16, 1), draw_negatives(again, 16, 1)), "same example, later step"
    models = [Model(torch.zeros(V, V)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        objective(infonce_weight=0.1, seed=seed)(model, batch(0, 2), {})
    assert torch.equal(models[0].calls[0]["negatives"], models[1].calls[0]["negatives"])
    assert not torch.equal(models[0].calls[0]["negatives"], models[2].calls[0]["negatives"])


def test_the_unshifted_loss_rewards_an_echo_and_the_shifted_one_does_not():
    echo = Model(torch.eye(V) * 30)
    result = objective(legacy_loss=True, lambda_retrieval=0.5)(echo, batch(0, 8), {})
    assert float(result.sums["ret"]) < 1e-3
    assert float(result.sums["lm"]) > 8 * 4 * 25
    shifted, echoed = echo.calls
    assert echoed["input_ids"].shape[1] == shifted["input_ids"].shape[1] + 1
    own = echoed["input_ids"].gather(1, echoed["readout_positions"])
    assert torch.equal(own, echoed["labels"].gather(1, echoed["readout_positions"]))
    assert torch.equal(echoed["readout_positions"], shifted["readout_positions"] + 1)
    assert int((unshifted(batch(0, 8))["labels"] != -100).sum()) == 8 * 4


def test_the_objective_needs_a_query():
    config = {"model": {"family": "baseline", "body": "llama", "vocab_size": 32000, "hidden_size": 16, "num_layers": 1,
                        "num_heads": 2}, "objective": {"name": "needle"}}
    for source in ({"kind": "synthetic"}, {"kind": "needle", "needle_query": False}):
        with pytest.raises(ValueError, match=r"objective\.name: needle needs data\.source\.kind needle"):
            RunConfig.model_validate({**config, "data": {"source": source}})
    RunConfig.model_validate({**config, "data": {"source": {"kind": "needle"}}})
    with pytest.raises(ValueError, match=r"lambda_retrieval: 0 leaves objective\.legacy_loss without weight"):
        objective(legacy_loss=True)
