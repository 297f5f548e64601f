"""Cross-entropy over a large vocabulary: fp32 arithmetic, a bounded number of logits alive, no fp32 copy of them.

Two levels. *Chunks* bound memory: with more than one, logits are dropped after the forward pass and computed again in
the backward pass, by calling the head module once more, so that hooks on it (ZeRO-3 gathers weights there) run as in
any forward. *Row blocks* inside a chunk bound the fp32 temporaries to what stays in cache: head and loss together run
2.4 times faster in bf16 and 1.2 times in fp32 than `logits.float()` with `F.cross_entropy` and `argmax` (measured on
one AVX-512-BF16 core, width 256, vocabulary 8192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.config.model import LOSS_CHUNK_BYTES

IGNORE_INDEX = -100
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**26
"""Elements of fp32 temporaries: a part of the cache on CPU, enough to fill the device elsewhere."""


class CrossEntropySums(NamedTuple):
    """Sums over labelled tokens. Divide by `n_tokens` of the whole update, not of this call."""

    nll_sum: Tensor
    """fp32 scalar: negative log-likelihood in nats."""
    n_tokens: Tensor
    """int64 scalar: labels that are not -100."""
    n_correct: Tensor
    """int64 scalar: labelled tokens whose label is the first of the largest logits."""
    z_sum: Tensor
    """fp32 scalar: squared log-normaliser (the z-loss of PaLM, arXiv:2204.02311 section 5)."""


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor],
                          chunk_tokens: int | None = None) -> CrossEntropySums:
    """Cross-entropy of `head(hidden)` against `labels`, differentiable in hidden states and head.

    Args:
        hidden: [N, D] in any floating dtype.
        labels: [N] int64 in [0, V) or -100 for tokens that do not count.
        head: the module that maps [n, D] to logits [n, V]. It is called once a chunk, and once more a chunk in the
            backward pass where there is more than one; it must be deterministic (no dropout).
        chunk_tokens: tokens whose logits are alive at once; None takes as many as fit into 256 MiB. Ranks that share
            partitioned weights must use the same N and chunk, or their collectives diverge.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [N, D] and labels [N], got {tuple(hidden.shape)} and {tuple(labels.shape)}")
    n = hidden.shape[0]
    step = chunk_tokens or _default_chunk(head, hidden)
    parts = []
    for start in range(0, max(n, 1), step):
        chunk, target = hidden[start:start + step], labels[start:start + step]
        logits = head(chunk)
        again = _Recompute(head, chunk) if n > step and logits.requires_grad else None
        parts.append(_TokenLoss.apply(logits, target, again))
        del logits
    nll, z, correct = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return CrossEntropySums(nll, (labels != IGNORE_INDEX).sum(), correct, z)


def _default_chunk(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Tokens whose logits fill LOSS_CHUNK_BYTES. All tokens where the head does not say how wide it is."""
    vocab_size = getattr(head, "out_features", None)
    if vocab_size is None:
        return max(hidden.shape[0], 1)
    return max(1, LOSS_CHUNK_BYTES // (int(vocab_size) * hidden.element_size()))


class _Recompute:
    """Calls the head again in the backward pass, under the autocast state of the forward pass."""

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
        self.head, self.hidden = head, hidden.detach()
        self.device_type = hidden.device.type
        self.autocast = torch.is_autocast_enabled(self.device_type)
        self.autocast_dtype = torch.get_autocast_dtype(self.device_type)

    def __call__(self) -> Tensor:
        context: AbstractContextManager[Any] = torch.autocast(self.device_type, self.autocast_dtype, self.autocast)
        with torch.no_grad(), context:
            return self.head(self.hidden)


class _TokenLoss(torch.autograd.Function):
    """(logits [n, V], labels [n]) -> sums of nll and squared log-normaliser, number of correct tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, recompute: _Recompute | None) -> tuple[Tensor, ...]:
        n = logits.shape[0]
        log_norm = logits.new_empty(n, dtype=torch.float32)
        first = torch.empty_like(labels)
        for rows in _row_blocks(logits):
            block = logits[rows].float()
            largest, first[rows] = block.max(-1)
            block = _subtract(block, largest, own=block.dtype != logits.dtype)
            log_norm[rows] = block.exp_().sum(-1).log_().add_(largest)
        counted = labels != IGNORE_INDEX
        picked = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0].float()
        ctx.recompute = recompute
        ctx.save_for_backward(labels, log_norm, *([] if recompute else [logits]))
        correct = ((first == labels) & counted).sum()
        ctx.mark_non_differentiable(correct)
        return (log_norm - picked).where(counted, 0).sum(), log_norm.square().where(counted, 0).sum(), correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad_nll, grad_z = grads[:2]
        labels, log_norm, *saved = ctx.saved_tensors
        logits = saved[0] if saved else ctx.recompute()
        grad = torch.empty_like(logits) if saved else logits
        counted = (labels != IGNORE_INDEX).float()
        scale = counted * (grad_nll + 2 * grad_z * log_norm)
        for rows in _row_blocks(logits):
            block = logits[rows].float()
            block = _subtract(block, log_norm[rows], own=block.dtype != logits.dtype).exp_().mul_(scale[rows, None])
            block.scatter_add_(1, labels[rows].clamp_min(0)[:, None], (-grad_nll * counted[rows])[:, None])
            grad[rows] = block
        return grad, None, None


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose fp32 copy stays within the block size of the device."""
    elements = _CPU_BLOCK if logits.device.type == "cpu" else _ACCELERATOR_BLOCK
    rows = max(1, elements // max(logits.shape[1], 1))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _subtract(block: Tensor, row_value: Tensor, *, own: bool) -> Tensor:
    """`block - row_value` by row, in place where the block is a copy of ours."""
    return block.sub_(row_value[:, None]) if own else block - row_value[:, None]
