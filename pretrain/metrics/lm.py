"""Figures of language models from sums of negative log-likelihood.

Everything here takes sums and counts, never means of batches: a mean of means weighs the tokens of a short batch more
than those of a long one. Sums are taken in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def token_weighted_loss(nll_sums: ArrayLike, n_tokens: ArrayLike) -> float:
    """Mean negative log-likelihood a token over all parts, each token weighing the same.

    Args:
        nll_sums: sums of negative log-likelihood of the parts, in nats, any shape.
        n_tokens: labelled tokens of each part, same shape; parts of zero tokens count for nothing.

    Returns:
        Nats a token; NaN where there is no token at all.
    """
    total = math.fsum(np.asarray(nll_sums, dtype=np.float64).ravel())
    count = int(np.asarray(n_tokens).astype(np.int64).sum())
    return total / count if count else math.nan


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats a token; infinity where that is beyond a float (a loss above 709.78)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nll_sum: float, n_bytes: int) -> float:
    """Bits spent on each byte of the text: nll_sum / (ln 2 * n_bytes).

    Unlike loss and perplexity it can be compared across tokenizers, because the unit of text is one that no tokenizer
    chooses. Tokens that stand for no text (end of document) cost bits and add no byte.

    Args:
        nll_sum: negative log-likelihood of all labelled tokens, in nats.
        n_bytes: UTF-8 bytes of those tokens.

    Returns:
        Bits a byte; NaN where there is no byte.
    """
    return nll_sum / (math.log(2.0) * n_bytes) if n_bytes else math.nan


def label_bytes(labels: np.ndarray, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes of the labelled tokens.

    Args:
        labels: token ids, any shape; negative ones are unlabelled and skipped.
        token_bytes: [V] bytes of each token.
    """
    kept = labels[labels >= 0]
    return int(token_bytes[kept].astype(np.int64).sum())
