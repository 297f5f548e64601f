"""Cases of the single-rank launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain.engine.distributed import World
from tests.engine import (
    afrb_cases,
    elastic_cases,
    feature_cases,
    shared_cases,
    spectra_cases,
    toy,
)
from tests.engine.running import finish, run, start
from tests.engine.world import main


def bare_loop(world: World, folder: Path) -> list[float]:
    """The same 20 updates in plain PyTorch: whole batch at once, AdamW, clipping, warmup and cosine by hand."""
    import math
    trainer = start(world, folder, "twin", data=shared_cases.UNEVEN, engine={"zero_stage": 0})
    config = trainer.config
    model = toy.build(config.model, toy.BuildContext(seed=config.seed))  # type: ignore[arg-type]
    dicts = [{"params": g.params, "weight_decay": g.weight_decay, "scale": g.lr_scale}
             for g in toy.groups(model, config.optim)]
    optimizer = torch.optim.AdamW(dicts, betas=config.optim.betas, eps=config.optim.eps)
    losses = []
    for step in range(20):
        (batch,) = next(trainer.loader).micro_batches
        output = model(**{k: batch[k] for k in ("input_ids", "labels")})
        loss = output.nll_sum / (batch["labels"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.optim.grad_clip)
        factor = (step + 1) / 5 if step < 5 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 5) / 14))
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * factor * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    finish(trainer)
    return losses


def golden(world: World, folder: Path) -> list[float]:
    """100 losses of a small Llama, fp32, ZeRO-2."""
    model = {"family": "baseline", "body": "llama", "vocab_size": 64, "hidden_size": 32, "num_layers": 2,
             "num_heads": 4}
    return run(world, folder, "golden", model=model, train={"length": "100 steps"}, optim={"lr": 0.003})


def evaluation_changes_nothing(world: World, folder: Path) -> dict[str, Any]:
    """Losses with an evaluation after every step, dropout on, equal those without."""
    from pretrain.config.interval import Interval
    from pretrain.engine.evaluator import EvalResult, Metric

    class Noisy:
        name = "noisy"
        every = Interval(1, "steps")
        modes: list[bool] = []  # noqa: RUF012

        def evaluate(self, view: Any) -> EvalResult:
            torch.rand(1000)
            zeros = torch.zeros(2, 16, dtype=torch.long)
            out = view.forward(input_ids=zeros, labels=zeros)
            self.modes.append(bool(out.nll_sum.requires_grad))
            return EvalResult({"val/loss": Metric(float(out.nll_sum), 32, False)})

    sections: dict[str, Any] = {"model": {"dropout": 0.3}, "checkpoint": {"every": None, "keep_best": 0}}
    plain = run(world, folder, "plain", **sections)
    trainer = start(world, folder, "evaluated", **sections)
    trainer.evaluators = [Noisy()]
    trainer.train()
    best = trainer.state.best_steps
    return {"plain": plain, "evaluated": finish(trainer), "grads": any(Noisy.modes), "best": best}


def next_link(world: World, folder: Path) -> dict[str, Any]:
    """4 ranks -> 1 rank."""
    return elastic_cases.next_link(world, folder, "four_ranks", 1)


CASES = {"bare_loop": bare_loop, "splits": shared_cases.splits, "contrastive": shared_cases.contrastive,
         "bf16": shared_cases.bf16, "evaluation_changes_nothing": evaluation_changes_nothing, "golden": golden,
         "next_link": next_link, "undisturbed": elastic_cases.undisturbed, "proof": elastic_cases.proof,
         **feature_cases.CASES, **afrb_cases.EVERYWHERE, "afrb_evaluated": afrb_cases.evaluated,
         **spectra_cases.CASES, "spectra_baseline": spectra_cases.baseline}

if __name__ == "__main__":
    main(CASES)
