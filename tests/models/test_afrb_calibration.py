"""What is set before the first step: whitened tables, the scale of the memory's logits, the readout map by ridge."""

from __future__ import annotations

import logging

import pytest
import torch

from pretrain.models.afrb.calibration import collect_pairs, set_scale, whiten_tables
from pretrain.models.afrb.ridge import fit_ridge, solve_ridge
from tests.models.afrb_small import MATRIX, VECTOR, Alone, V, build, hooks, open_up


def test_primal_and_dual_are_one_solution():
    generator = torch.Generator().manual_seed(0)
    for pairs, width in ((20, 50), (50, 20)):
        z = torch.randn(pairs, width, generator=generator)
        e = torch.randn(pairs, 7, generator=generator)
        for absolute in (False, True):
            primal, dual = (solve_ridge(z, e, 1e-3, absolute=absolute, dual=dual) for dual in (False, True))
            torch.testing.assert_close(primal, dual, rtol=1e-7, atol=1e-9)
    gradient = z.double().T @ (z.double() @ primal - e.double()) + 1e-3 * primal
    assert float(gradient.abs().max()) < 1e-9  # of the absolute penalty: the minimum


def test_a_planted_map_is_found_and_noise_is_not():
    generator = torch.Generator().manual_seed(1)
    z, planted = torch.randn(300, 40, generator=generator), torch.randn(40, 60, generator=generator)
    fit = fit_ridge(z, z @ planted, 1e-6)
    assert fit.r2_heldout > 0.99 and fit.rank == 40 and fit.cosine_heldout > 0.99 and fit.pairs == 300
    torch.testing.assert_close(fit.weight.float(), planted, rtol=1e-3, atol=1e-3)
    wide = torch.randn(64, 512, generator=generator)
    few = fit_ridge(wide, torch.randn(64, 60, generator=generator), 1e-6)
    assert few.r2_train > 0.99 and few.r2_heldout < 0.1  # fewer pairs than features say nothing


@pytest.mark.parametrize("mode", [{**VECTOR}, {**VECTOR, "kiss_ridge_target": "dual"}, {**MATRIX, "pvm_dk": 128}])
def test_calibration_sets_the_map_and_says_what_it_found(mode, caplog):
    """The fitted map is the ridge solution of the pairs, by the dual rows where those are meant, and is logged."""
    cfg = {**mode, "kiss_ridge_calib": True, "kiss_ridge_max_pairs": 64}
    model = open_up(build(cfg))
    ctx = Alone(model)
    with caplog.at_level(logging.INFO, "pretrain"):
        hooks(cfg).before_engine(ctx)
    assert "[KISS-RIDGE] Calibrated pvm2emb: 64 pairs, λ=0.001" in caplog.text
    assert "[KISS-RIDGE] R2 train=" in caplog.text and " heldout=" in caplog.text
    assert bool(model.calibrated)
    features, targets = collect_pairs(model, ctx, 64)
    module = model.memory or model.readout
    want = solve_ridge(features[:51], targets[:51], 1e-3).T.float()
    torch.testing.assert_close(module.project.detach(), want, rtol=1e-3, atol=1e-4)
    said = model(**{k: ctx.train_samples(1)[k] for k in ("input_ids", "readout_positions")}, diagnostics=True)
    torch.testing.assert_close(features[:4].float(), said.diagnostics["readout"][0], rtol=1e-4, atol=1e-5)
    fitted = module.project.detach().clone()
    with torch.no_grad():
        module.project.zero_()
    hooks(cfg).before_engine(ctx)  # weights of a calibrated run are not fitted again
    assert not module.project.any()
    hooks({**cfg, "kiss_ridge_force": True}).before_engine(ctx)
    assert torch.equal(module.project, fitted)


def test_targets_are_the_rows_of_the_wanted_tokens():
    model = build({**VECTOR})
    features, targets = collect_pairs(model, Alone(model), 10)
    sample = Alone().train_samples(3)
    wanted = sample["labels"].gather(1, sample["readout_positions"]).flatten()[:10]
    torch.testing.assert_close(targets.float(), model.get_output_embeddings().weight[wanted])
    assert features.shape == (10, 32) and features.dtype == torch.float64
    dual = build({**VECTOR, "kiss_ridge_target": "dual"})
    rows = dual.get_output_embeddings().weight.double()
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / V
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(32)
    want = torch.linalg.solve(covariance, centred[wanted].T).T
    torch.testing.assert_close(collect_pairs(dual, Alone(dual), 10)[1], want, rtol=1e-3, atol=1e-3)
    plain = collect_pairs(model, Alone(model, rows=0), 80)[0]  # samples without rows: 40 of each here
    assert plain.shape == (80, 32)


def test_ranks_share_the_work_and_get_the_same_pairs():
    """Two ranks, one after the other: each puts in its own samples, together they have those of one process."""
    model = build({**VECTOR})
    alone = collect_pairs(model, Alone(model), 24)
    sums: list[torch.Tensor] = []

    class Ranked(Alone):
        world_size = 2

        def __init__(self, rank, known):
            super().__init__(model)
            self.rank, self.known, self.calls = rank, known, 0

        def all_reduce(self, tensor):
            self.calls += 1
            if len(self.known) < 2:
                self.known.append(tensor.clone())
                return tensor
            return tensor + self.known[self.calls - 1]

    collect_pairs(model, Ranked(0, sums), 24)
    together = collect_pairs(model, Ranked(1, sums), 24)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b)


def test_the_scale_is_nine_times_what_first_choices_stand_above_the_mean():
    model = build({**MATRIX})
    whiten_tables(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    scale = set_scale(model, Alone(model))
    with torch.no_grad():
        logits = model(Alone().train_samples(8)["input_ids"], return_logits=True, controls={"readout_off": 1.0}).logits
    assert scale == pytest.approx(9 * float((logits.amax(-1) - logits.mean(-1)).mean()), rel=0.05)
    assert model.memory.log_scale().exp().item() == pytest.approx(scale, rel=1e-6)
