"""What a run costs, as text and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.config.cost import Bill, StepTime, bill
from pretrain.config.plan import Plan


def cost_lines(plan: Plan, step: StepTime | None, price: float | None, device: str) -> Iterator[str]:
    """The terms of a step where they are modelled, then days, device hours and cost."""
    if step is not None:
        width = max(len(term.name) for term in step.terms)
        ranks = plan.world_size
        yield f"time of a step, W = {ranks}, R = (W - 1) / W = {(ranks - 1) / ranks:.4g}:"
        for term in step.terms:
            yield f"  {term.name:<{width}}  {_seconds(term.seconds):>9}  {term.formula}"
        yield f"  {'sum':<{width}}  {_seconds(step.most):>9}  ({_seconds(step.least)} where communication hides)"
    for name, found in _bills(plan, step, price):
        cost = f", {_figure(found.cost)} at {price:g} an hour" if found.cost is not None else ""
        yield (f"{name}: {plan.steps:,} steps in {found.hours / 24:.3g} days, {_figure(found.device_hours)} {device} "
               f"hours{cost}")


def cost_json(plan: Plan, step: StepTime | None, price: float | None) -> dict[str, Any]:
    """The same for programs; seconds by term."""
    terms = None if step is None else {term.name: term.seconds for term in step.terms}
    return {"step_seconds": terms, "bills": {
        name: {"hours": found.hours, "device_hours": found.device_hours, "cost": found.cost}
        for name, found in _bills(plan, step, price)}}


def _bills(plan: Plan, step: StepTime | None, price: float | None) -> Iterator[tuple[str, Bill]]:
    if step is not None:
        yield "at most", bill(plan.steps, step.most, plan.world_size, price)
        yield "at least", bill(plan.steps, step.least, plan.world_size, price)
    elif plan.hours is not None:
        yield "in all", bill(plan.steps, plan.hours * 3600 / plan.steps, plan.world_size, price)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
