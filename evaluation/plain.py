"""Causal language models of transformers, called as they are, behind our forward.

Such models let the documents of a window see each other. Here each document is cut out and becomes a row of its own,
padded at the right, where a causal model cannot look. That is exact for every architecture (attention, recurrence,
convolution) and touches none of its insides; it costs padding where documents are short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.models.base import LMOutput
from pretrain.ops.documents import document_layout

IGNORE_LABEL = -100


class PlainCausalLM(nn.Module):
    """Our forward around a transformers model that returns `logits`."""

    def __init__(self, native: PreTrainedModel) -> None:
        super().__init__()
        self.native = native

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, past_key_values: Any | None = None, use_cache: bool = False,
                return_logits: bool = False, logits_to_keep: int = 0) -> LMOutput:
        """Logits of each document alone, then loss sums.

        Args:
            input_ids: [B, T].
            labels: [B, T], already shifted, -100 where a position has none.
            document_ids: [B, T], equal inside a document; None: a row is one document.
            attention_mask: [B, T], 0 at padding, which is a document of its own.
            past_key_values, use_cache: for decoding rows of one document; then the other arguments are not allowed.
            return_logits: also return logits [B, T, V]; `logits_to_keep` > 0 limits them to the last positions.
        """
        if use_cache or past_key_values is not None:
            if labels is not None or document_ids is not None or attention_mask is not None:
                raise ValueError("with a cache, rows are single documents and have no labels")
            out = self.native(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)
            return LMOutput(logits=out.logits[:, -logits_to_keep:] if return_logits else None,
                            past_key_values=out.past_key_values)
        rows, starts, lengths = _documents(input_ids, document_ids, attention_mask)
        width = int(lengths.max())
        offsets = torch.arange(width, device=input_ids.device)
        inside = offsets < lengths[:, None]
        places = torch.where(inside, starts[:, None] + offsets, 0)
        logits = self.native(input_ids=torch.where(inside, input_ids[rows[:, None], places], 0), use_cache=False).logits
        kept = logits[inside]
        if labels is None:
            return LMOutput(logits=_back(kept, input_ids)[:, -logits_to_keep:] if return_logits else None)
        wanted = labels[rows[:, None], places][inside]
        nll, correct = _sums(kept, wanted)
        return LMOutput(nll_sum=nll, n_tokens=(wanted != IGNORE_LABEL).sum(), n_correct=correct,
                        logits=_back(kept, input_ids)[:, -logits_to_keep:] if return_logits else None)


def _documents(input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
    """(row, first place, length) of each document, [documents] int64 each, in order of rows and places."""
    layout = document_layout(document_ids, attention_mask)
    batch, length = input_ids.shape
    if layout is None:
        every = torch.arange(batch, device=input_ids.device)
        return every, torch.zeros_like(every), torch.full_like(every, length)
    rows, places = (layout.starts == torch.arange(length, device=input_ids.device)).nonzero(as_tuple=True)
    return rows, places, layout.ends[rows, places] - places


def _back(kept: Tensor, input_ids: Tensor) -> Tensor:
    """Logits [tokens, V] of the documents in order -> [B, T, V]: the documents tile the rows in that order."""
    return kept.reshape(*input_ids.shape, kept.shape[-1])


def _sums(logits: Tensor, labels: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in fp32 and first guesses, over [tokens, V] in chunks of tokens."""
    nll = torch.zeros((), dtype=torch.float32, device=logits.device)
    correct = torch.zeros((), dtype=torch.int64, device=logits.device)
    for part, wanted in zip(logits.split(chunk), labels.split(chunk), strict=True):
        nll += nn.functional.cross_entropy(part.float(), wanted, ignore_index=IGNORE_LABEL, reduction="sum")
        correct += (part.argmax(-1) == wanted).sum()
    return nll, correct
