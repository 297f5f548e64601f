"""Clocks and phases, and what a forward knows of its tokens (spec, sections 1 to 3)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.afrb.schema import AFRBConfig, Clock, Ladder
from pretrain.ops.associative_memory import wide
from pretrain.ops.documents import document_layout
from pretrain.ops.phase import causal_taps

LADDER_TOP = 600.0
"""Fastest frequency of the log-time ladder; the slowest is 1."""
ROPE_BASE = 10_000.0


class Tokens(NamedTuple):
    """Where the T tokens of a call stand."""

    positions: Tensor
    """[B or 1, T] int64: position in the document, from 0."""
    past: int
    """Tokens of each row before these."""
    starts: Tensor | None = None
    """[B, T] int64: first token of each token's document, counted from the row's first. None: 0 for all."""
    real: Tensor | None = None
    """[B, T] bool: False at padding. None: nothing is padded."""

    @property
    def resets(self) -> Tensor | None:
        """[B, T] True where a document begins; None where none begins within the row."""
        return None if self.starts is None else self.positions == 0

    @property
    def reach(self) -> Tensor | None:
        """How far convolutions may look back; None: as far as there are tokens."""
        return None if self.starts is None else self.positions


def token_layout(input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None, past: int) -> Tokens:
    """Layout of the last T of past + T tokens; ids and mask cover all of them. Padding is a document of its own.

    Raises ValueError where they do not.
    """
    total = past + input_ids.shape[1]
    for name, tensor in (("document_ids", document_ids), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != (input_ids.shape[0], total):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but there are {input_ids.shape[0]} rows of "
                             f"{total} tokens, {past} of them in the state")
    layout = document_layout(document_ids, attention_mask)
    if layout is None:
        return Tokens(torch.arange(past, total, device=input_ids.device)[None], past)
    real = None if attention_mask is None else attention_mask.bool()[:, past:]
    return Tokens(layout.positions[:, past:], past, layout.starts[:, past:], real)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """[B, T, ...] at rows [B, R] -> [B, R, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], rows]


def frequencies(mode: Ladder, width: int, omega: float) -> Tensor:
    """Angular frequency of each of the H = width // 2 channel pairs, fp32 [H]; [1] where all have the same."""
    pairs = max(1, width // 2)
    index = torch.arange(pairs, dtype=torch.float32)
    if mode == "scalar":
        return torch.full((1,), omega, dtype=torch.float32)
    if mode == "ladder":
        return torch.exp(index / max(1, pairs - 1) * math.log(LADDER_TOP))
    if mode == "uniform":
        return 2 * math.pi * (index + 0.5) / pairs
    return ROPE_BASE ** (-index / pairs)


def clock_time(clock: Clock, positions: Tensor) -> Tensor:
    """[..., 1] in the widest float: ln(1 + t), t, or 0 where nothing turns."""
    time = positions.to(wide(positions.device))[..., None]
    if clock == "log":
        return torch.log1p(time)
    return time if clock == "token" else torch.zeros_like(time)


def tap_angles(clock: Clock, turn: Tensor, taps: int, positions: Tensor) -> Tensor:
    """[k, B or 1, T or 1, H]: how far each pair turns between the token l places back and this one.

    By token time that is l times its frequency, whatever the position; by log time it shrinks along the document.
    """
    back = torch.arange(taps, device=positions.device)
    if clock == "log":
        here = positions.to(wide(positions.device))
        earlier = (here[None] - back[:, None, None]).clamp(min=0)
        passed = torch.log1p(here)[None] - torch.log1p(earlier)
        return passed[..., None] * turn.to(passed.dtype)
    passed = clock_time(clock, back)[:, None, None]
    return passed * turn.to(passed.dtype)


class Scalar(nn.Module):
    """A number, learned or not, that keeps fp32 accuracy where parameters are cast to 16 bits: start plus change."""

    def __init__(self, start: float, *, learned: bool = True) -> None:
        super().__init__()
        self.register_buffer("start", torch.full((1,), start, dtype=torch.float32))
        self.register_parameter("change", nn.Parameter(torch.zeros(1)) if learned else None)

    def forward(self, trained: float = 1.0) -> Tensor:
        """Its value, [1] fp32; `trained` as in `masked`."""
        return self.start if self.change is None else self.start + masked(self.change, trained).float()


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Where autocast would round products to 16 bits, it does not."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def masked(parameter: Tensor, trained: float) -> Tensor:
    """The parameter itself, its gradient times `trained`: 0 freezes it, yet all ranks go on to reduce a gradient."""
    return parameter.detach() + trained * (parameter - parameter.detach())


class WriteGate(nn.Module):
    """g_t = sigmoid(w . GELU(causal convolution of each channel) + b): how much of each token is written.

    The channels are the inputs' own, or `marks` learned features of each token, GELU(M x_t): a reserved token then
    stands out before the tokens around it are added to it.
    """

    def __init__(self, width: int, taps: int, start: float, marks: int = 0) -> None:
        super().__init__()
        self.width, self.taps = width, taps
        self.marks = nn.Parameter(torch.empty(marks, width)) if marks else None
        self.conv = nn.Parameter(torch.empty(taps, marks or width))
        self.weight = nn.Parameter(torch.empty(marks or width))
        self.bias = Scalar(start)

    @classmethod
    def of(cls, cfg: AFRBConfig, width: int) -> WriteGate | None:
        """The gate of a memory that is written at rows of this width; None where there is none."""
        if not cfg.pvm_write_gate:
            return None
        return cls(width, cfg.pvm_gate_taps, cfg.pvm_write_gate_init, cfg.pvm_gate_marks)

    def reset_parameters(self) -> None:
        """Fresh weights."""
        if self.marks is not None:
            nn.init.normal_(self.marks, std=self.width ** -0.5)
        nn.init.normal_(self.conv, std=self.taps ** -0.5)
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, x: Tensor, tokens: Tokens, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """(g [B, T, 1], channels [B, T, C]) of x [B, T, D]; `before` [B, k-1, C] are those of the tokens before."""
        channels = x if self.marks is None else nn.functional.gelu(x @ self.marks.to(x.dtype).T)
        mixed = causal_taps(channels, self.conv.to(x.dtype), before=before, reach=tokens.reach)
        logits = nn.functional.gelu(mixed) @ self.weight.to(x.dtype)[:, None]
        return torch.sigmoid(logits + self.bias().to(x.dtype)), channels
