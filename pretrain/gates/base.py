"""What all gates share: the result, the difference of two outputs, and the state a model is probed in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAME_SHAPES = 1e-5
"""Limit where both forwards do the same arithmetic and only foreign tokens differ. Convolutions by FFT spread rounding
over the window, hence not zero."""
OTHER_SHAPES = 1e-4
"""Limit where shapes differ, so that sums run in another order."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate on one model: passed where `value` is on the right side of `limit`."""

    name: str
    passed: bool
    value: float
    limit: float
    message: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A model in eval mode and fp32, and where its random tokens come from."""

    model: PreTrainedModel
    vocab_size: int
    seq_len: int
    device: torch.device
    generator: torch.Generator
    language_model: bool

    def tokens(self, rows: int, length: int) -> Tensor:
        """Uniform random ids [rows, length]."""
        drawn = torch.randint(0, self.vocab_size, (rows, length), generator=self.generator)
        return drawn.to(self.device)

    def other_tokens(self, tokens: Tensor) -> Tensor:
        """Random ids of the same shape that differ from `tokens` at every place."""
        shift = torch.randint(1, self.vocab_size, tokens.shape, generator=self.generator).to(self.device)
        return (tokens + shift) % self.vocab_size

    def takes(self, argument: str) -> bool:
        """Whether the model's forward has this argument, or passes on whatever it is given."""
        parameters = inspect.signature(self.model.forward).parameters
        return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def logits(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """[B, T, V] of a language model."""
        return self.model(input_ids=input_ids, return_logits=True, **inputs).logits


def relative_difference(probed: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected. Not a number where either holds one."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((probed - expected).abs().max() / scale)


def at_most(name: str, value: float, limit: float, meaning: str) -> GateResult:
    """Passed where value <= limit; values that are not numbers never pass."""
    passed = value <= limit
    return GateResult(name, passed, value, limit, f"{meaning}: relative difference {value:.2g}, "
                      f"{'within' if passed else 'above'} {limit:.0e}")


@contextmanager
def probing(model: PreTrainedModel, seed: int) -> Iterator[PreTrainedModel]:
    """The model in eval mode and fp32 (a copy where its weights are not), with every all-zero parameter opened.

    Adapters and gates often start at zero and hide what lies behind them until training opens them; here they hold
    small noise while the gates run. Mode, weights and random state are restored.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()
    was_training = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(seed)
    closed = [p for p in model.parameters() if p.numel() and not bool(p.detach().any())]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model.eval()
            for parameter in closed:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            yield model
        finally:
            for parameter in closed:
                parameter.zero_()
            for module, training in was_training.items():
                module.training = training
