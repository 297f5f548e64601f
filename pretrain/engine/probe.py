"""A figure that equal weights must reproduce: written with every checkpoint, compared after every load."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from pretrain.engine import rng
from pretrain.engine.build import Engine
from pretrain.errors import DataCorruption, Divergence
from pretrain.models.base import EncoderOutput, LMOutput

RTOL_OTHER_WORLD = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Tolerance where world size, stage or hardware changed."""


def measure(engine: Engine, inputs: Mapping[str, torch.Tensor], controls: Mapping[str, float]) -> dict[str, float]:
    """Figures of the model's output on `inputs` in eval mode, as exact floats.

    Collective: every rank runs the same inputs. Mode and random state are left as they were.
    """
    was_training = engine.model.training
    with rng.preserved(), torch.no_grad():
        engine.ds.eval()
        try:
            output = engine.forward(**{k: v.to(engine.world.device) for k, v in inputs.items()}, controls=controls)
        finally:
            engine.ds.train(was_training)
    return figures(output)


def require_finite(engine: Engine, measured: Mapping[str, float], step: int) -> None:
    """Raise Divergence, alike on every rank, where the weights or the figures of the model are not finite. Collective.

    Every rank looks at its part of the weights once, without a copy.
    """
    odd = [f"{name} = {value}" for name, value in measured.items() if not math.isfinite(value)]
    limits = [torch.stack(torch.aminmax(part)).float() for _, part in own_parts(engine) if part.numel()]
    if not odd and limits and not bool(torch.isfinite(torch.cat(limits)).all()):
        odd = [f"weights of rank {engine.world.rank}"]
    if engine.world.agree(not odd):
        return
    told = [what for rank in engine.world.gather_objects(odd) for what in rank]
    error = Divergence(f"step {step}: not finite: {', '.join(dict.fromkeys(told))}; no checkpoint is written of this, "
                       "those before stand; go on from there with a lower optim.lr, or train.on_spike rewind")
    error.agreed = True
    raise error


def own_parts(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's share of all weights by name, as they lie: its partitions, or of whole weights every W-th."""
    world = engine.world
    for number, (name, parameter) in enumerate(engine.model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        if engine.stage == 3:
            held = parameter.ds_tensor.detach().flatten()  # type: ignore[attr-defined]
            yield name, held[:max(0, int(parameter.ds_numel) - world.rank * held.numel())]  # type: ignore[attr-defined]
        elif number % world.size == world.rank:
            yield name, parameter.detach()


def hardware(engine: Engine) -> list[str]:
    """What the last bits of a figure depend on beside the weights: torch, the device, and threads on a CPU."""
    device = engine.world.device
    if device.type == "cuda":
        return [torch.__version__, torch.cuda.get_device_name(device)]
    return [torch.__version__, device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]


def figures(output: Any) -> dict[str, float]:
    """Scalars that stand for an output."""
    if isinstance(output, LMOutput):
        assert output.nll_sum is not None and output.n_tokens is not None
        return {"nll_sum": float(output.nll_sum), "n_tokens": float(output.n_tokens)}
    if isinstance(output, EncoderOutput):
        assert output.heads is not None
        return {name: float(head.double().abs().sum()) for name, head in output.heads.items()}
    raise TypeError(f"a model's forward returned {type(output).__name__}, neither LMOutput nor EncoderOutput")


def compare(saved: Mapping[str, float], now: Mapping[str, float], *, exact: bool, precisions: Collection[str],
            where: str) -> None:
    """Raise DataCorruption where the loaded weights do not give the saved figures.

    `exact` asks for equal bits; else the widest tolerance among `precisions` of both sides holds.
    """
    rtol = 0.0 if exact else max(RTOL_OTHER_WORLD[precision] for precision in precisions)
    for name, want in saved.items():
        have = now.get(name)
        if have is None or not abs(have - want) <= rtol * max(abs(want), 1e-12):
            raise DataCorruption(f"{where}: the loaded weights give {name} = {have!r} on the stored batch, the saved "
                                 f"ones gave {want!r}; the checkpoint does not hold what was trained")
