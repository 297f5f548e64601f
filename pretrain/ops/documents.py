"""Documents inside a window: where each begins and ends, positions that restart, and the attention mask that keeps
them apart.

A *document* is a maximal run of equal ids in a row. Padding is a document of its own, so real tokens never see it and
every query sees at least itself (no row of a mask is empty, hence no NaN).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PADDING = -1


class DocumentLayout(NamedTuple):
    """For each token [B, S] int64, of the document it belongs to: first index, and index after the last."""

    starts: Tensor
    ends: Tensor

    @property
    def positions(self) -> Tensor:
        """[B, S] position of each token inside its document, from 0."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts


class QueryBlock(NamedTuple):
    """Queries [start, stop) and the keys [key_start, key_stop) that any of them sees."""

    start: int
    stop: int
    key_start: int
    key_stop: int


def document_layout(document_ids: Tensor | None, attention_mask: Tensor | None) -> DocumentLayout | None:
    """Layout of a batch, None where neither argument is given (one document a row, nothing padded).

    Args:
        document_ids: [B, S] integers >= 0, equal inside a document and different in neighbouring documents.
        attention_mask: [B, S], 0 or False where a token is padding.
    """
    if document_ids is None and attention_mask is None:
        return None
    ids = torch.zeros_like(attention_mask, dtype=torch.int64) if document_ids is None else document_ids
    if attention_mask is not None:
        ids = torch.where(attention_mask.bool(), ids, _PADDING)
    index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    opens = torch.ones_like(ids, dtype=torch.bool)
    opens[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = torch.where(opens, index, 0).cummax(1).values
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    after = torch.where(closes, index + 1, ids.shape[1])
    ends = after.flip(1).cummin(1).values.flip(1)
    return DocumentLayout(starts, ends)


def document_starts(document_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """[B, S] True at the first token of each document: where recurrences begin anew. None as in `document_layout`."""
    layout = document_layout(document_ids, attention_mask)
    return None if layout is None else layout.positions == 0


def attention_bias(layout: DocumentLayout | None, queries: int, keys: int, *, causal: bool, dtype: torch.dtype,
                   device: torch.device, window: int | None = None) -> Tensor:
    """Additive mask [B or 1, 1, queries, keys]: 0 where a query sees a key, -inf elsewhere.

    The queries are the last `queries` of the `keys` tokens (a cache holds the others). With a `window` they see no key
    more than `window` - 1 tokens back.
    """
    key = torch.arange(keys, device=device)
    query = key[keys - queries:, None]
    hidden = (key > query)[None] if causal else torch.zeros(1, queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        hidden = hidden | (key <= query - window)
    if layout is not None:
        hidden = hidden | (key < layout.starts[:, keys - queries:, None])
        if not causal:
            hidden = hidden | (key >= layout.ends[:, keys - queries:, None])
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None]


def query_blocks(layout: DocumentLayout | None, length: int, *, causal: bool, size: int,
                 window: int | None = None) -> list[QueryBlock]:
    """Cut `length` queries into blocks, each with the range of keys that is not masked for all of its queries.

    Reads the layout on the host, so it is meant for CPU tensors.
    """
    first = list(range(0, length, size))
    last = [min(start + size, length) - 1 for start in first]
    low = [0] * len(first) if layout is None else layout.starts[:, first].amin(0).tolist()
    if window is not None:
        low = [max(key, start - window + 1) for key, start in zip(low, first, strict=True)]
    if causal:
        high = [index + 1 for index in last]
    else:
        high = [length] * len(first) if layout is None else layout.ends[:, last].amax(0).tolist()
    return [QueryBlock(a, b + 1, c, d) for a, b, c, d in zip(first, last, low, high, strict=True)]
