"""The linear recurrence on one CPU thread, forward and backward, beside a loop over tokens and matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Comparison, Summary, compare, rounds, wall_seconds, write_results
from pretrain.ops.linear_recurrence import linear_recurrence

T, LONG = 2048, 16384
SHAPES = {"D=256": (1, 256), "D=256, batch 8": (8, 256), "D=2048": (1, 2048)}
LOOP_GOAL = {"D=256": 4.0, "D=2048": 1.5}
TOEPLITZ_GOAL, LENGTH_GOAL = 1 / 3, 9.0
PAIRS = 12


def loop(w: Tensor, a: Tensor) -> Tensor:
    """A token at a time, as fast as a loop goes: inputs cut once, one fused operation a token, joined once."""
    state, states = torch.zeros_like(w[:, 0]), []
    for w_t, a_t in zip(w.unbind(1), a[..., None].unbind(1), strict=True):
        state = torch.addcmul(w_t, a_t, state)
        states.append(state)
    return torch.stack(states, 1)


def decay_matrix(a: Tensor) -> Tensor:
    """[B, T, T]: what is left at t of what was written at r."""
    logs = a.double().log().cumsum(-1)
    return (logs[..., :, None] - logs[..., None, :]).exp_().tril_().to(a.dtype)


def chunked_products(w: Tensor, a: Tensor, size: int = 32) -> Tensor:
    """States by products with the [C, C] matrices of all chunks, then what enters each chunk. Forward only."""
    batch, length, width = w.shape
    a = a.view(batch, -1, size)
    inside = torch.bmm(decay_matrix(a).flatten(0, 1), w.view(-1, size, width)).view(batch, -1, size, width)
    left = a.cumprod(-1)[..., None]
    ends = inside[:, :, -1].clone()
    for chunk in range(1, ends.shape[1]):
        ends[:, chunk].addcmul_(left[:, chunk, -1], ends[:, chunk - 1])
    inside[:, 1:].addcmul_(left[:, 1:], ends[:, :-1, None])
    return inside.view(batch, length, width)


def ours(w: Tensor, a: Tensor) -> Tensor:
    """The scan."""
    return linear_recurrence(w, a).states


def case(batch: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, decays of each token and a gradient of the states."""
    draw = torch.Generator().manual_seed(0)
    w, grad = (torch.randn(batch, length, width, generator=draw) for _ in range(2))
    a = 0.5 + 0.5 * torch.rand(batch, length, generator=draw)
    return w.requires_grad_(), a.requires_grad_(), grad


def milliseconds(scan: Callable[[Tensor, Tensor], Tensor], w: Tensor, a: Tensor, grad: Tensor) -> float:
    """Forward and backward, gradients of inputs and decays."""
    return 1e3 * wall_seconds(lambda: torch.autograd.grad(scan(w, a), (w, a), grad))


def against_loop(batch: int, width: int) -> Comparison:
    """The loop's time over ours, as milliseconds of each."""
    inputs = case(batch, T, width)
    return compare(functools.partial(milliseconds, loop, *inputs), functools.partial(milliseconds, ours, *inputs),
                   unit="ms", pairs=PAIRS)


def against_toeplitz(batch: int, width: int) -> Comparison:
    """Our forward and backward over one product with the whole T x T matrix, which is there already."""
    w, a, grad = case(batch, T, width)
    with torch.no_grad():
        matrix, values = decay_matrix(a), w.detach()
    return compare(functools.partial(milliseconds, ours, w, a, grad),
                   lambda: 1e3 * wall_seconds(lambda: torch.bmm(matrix, values)), unit="ms", pairs=PAIRS)


def against_chunked_products(batch: int, width: int) -> Comparison:
    """Forward alone, over the usual form."""
    w, a, _ = (x.detach() for x in case(batch, T, width))
    return compare(lambda: 1e3 * wall_seconds(lambda: ours(w, a)),
                   lambda: 1e3 * wall_seconds(lambda: chunked_products(w, a)), unit="ms", pairs=PAIRS)


def lengths(width: int) -> tuple[dict[str, Summary], float]:
    """Time of a short and a long sequence in turn, and the ratio of their medians."""
    found = rounds({f"T={length}": functools.partial(milliseconds, ours, *case(1, length, width))
                    for length in (T, LONG)}, unit="ms", n=PAIRS)
    short, long = found.values()
    return found, long.median / short.median


def check() -> None:
    """The three forms agree, or the figures mean nothing."""
    w, a, _ = (x.detach() for x in case(2, 256, 8))
    expected = loop(w, a)
    for other in (ours, chunked_products):
        torch.testing.assert_close(other(w, a), expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    """Run it all; about a minute."""
    torch.set_num_threads(1)
    check()
    loops = {name: against_loop(*shape) for name, shape in SHAPES.items()}
    toeplitz = {name: against_toeplitz(*SHAPES[name]) for name in LOOP_GOAL}
    products = {name: against_chunked_products(*SHAPES[name]) for name in LOOP_GOAL}
    growth = {f"D={width}": lengths(width) for width in (256, 2048)}
    for name, found in loops.items():
        goal = LOOP_GOAL.get(name)
        verdict = "" if goal is None else f"; goal {goal:g} or more: {_met(found.ratio.median >= goal)}"
        print(f"{name}: ours {found.other}, loop {found.ours}, loop over ours {found.ratio}{verdict}")
    for name, found in toeplitz.items():
        print(f"{name}: over one Toeplitz product {found.ratio}; goal 1/3 or less: "
              f"{_met(found.ratio.median <= TOEPLITZ_GOAL)}")
    for name, found in products.items():
        print(f"{name}: forward over chunked products {found.ratio}")
    for name, (found_lengths, ratio) in growth.items():
        print(f"{name}: {'; '.join(map(str, found_lengths.values()))}; ratio {ratio:.3g}, goal {LENGTH_GOAL:g} or "
              f"less: {_met(ratio <= LENGTH_GOAL)}")
    write_results("recurrence", {
        "tokens": T, "threads": 1, "loop_over_ours": loops, "loop_goals": LOOP_GOAL, "ours_over_toeplitz": toeplitz,
        "toeplitz_goal": TOEPLITZ_GOAL, "forward_over_chunked_products": products,
        "growth": {name: {"times": found, "ratio": ratio} for name, (found, ratio) in growth.items()},
        "growth_goal": LENGTH_GOAL})


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


if __name__ == "__main__":
    main()
