"""Cases of AFRB's parts that several ranks take part in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.distributed import World
from pretrain.ops.linear_recurrence import linear_recurrence


def sequence_parallel(world: World, folder: Path) -> dict[str, Any]:
    """States and gradients of one recurrence whose 24 tokens lie on all ranks, every form of decay, resets, padding."""
    found = {}
    for form, shape in {"token": (2, 24), "channel": (3,), "token and channel": (2, 24, 3)}.items():
        generator = torch.Generator().manual_seed(1)

        def rand(*size: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.rand(*size, generator=generator, dtype=torch.float64)

        w, a, initial = (x.requires_grad_() for x in (rand(2, 24, 3) - 0.5, rand(*shape) ** 0.2, rand(2, 3)))
        resets, mask, pull = rand(2, 24) < 0.05, rand(2, 24) > 0.1, rand(2, 24, 3)
        share = 24 // world.size
        own = slice(world.rank * share, (world.rank + 1) * share)
        states = linear_recurrence(w[:, own], a if a.ndim == 1 else a[:, own], initial=initial, resets=resets[:, own],
                                   mask=mask[:, own], group=dist.group.WORLD).states
        (states * pull[:, own]).sum().backward()
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (w, a, initial)]
        for grad in grads:
            dist.all_reduce(grad)
        whole = torch.zeros(2, 24, 3, dtype=torch.float64)
        whole[:, own] = states.detach()
        dist.all_reduce(whole)
        found[form] = [x.flatten().tolist() for x in (whole, *grads)]
    return found


CASES = {"sequence_parallel": sequence_parallel}
