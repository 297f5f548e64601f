"""N-gram baselines of a run: trained on what the model was trained on, evaluated on what it is evaluated on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from evaluation.ngram import MAX_ORDER, NGramModel, Predictions
from evaluation.results import NGramRecord
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.mixture import MixtureSource, pack
from pretrain.data.open import TrainingData, open_source, open_training
from pretrain.metrics.lm import bits_per_byte, label_bytes, perplexity

MAX_TOKENS = 100_000_000
"""Largest training text of a baseline; counting one takes about 70 bytes a token at its peak."""
_READ_WINDOWS = 1024
_SCOPES: tuple[Literal["equal tokens", "full split"], ...] = ("equal tokens", "full split")
_log = logging.getLogger(__name__)


def read_predictions(batches: Iterable[Batch], vocab_size: int, *, document_masking: bool) -> tuple[Predictions, int]:
    """Every labelled token of the batches, and the number of tokens read.

    Contexts stay inside documents where documents are masked, as the model's do.
    """
    parts, tokens = [], 0
    for batch in batches:
        documents = batch.tensors.get("document_ids") if document_masking else None
        parts.append(Predictions.from_windows(batch["input_ids"].numpy(), batch["labels"].numpy(),
                                              None if documents is None else documents.numpy(), vocab_size))
        tokens += batch["input_ids"].numel()
    return Predictions.join(parts), tokens


def trained_windows(data: TrainingData, samples: int) -> Iterator[Batch]:
    """The windows among the first `samples` of a run's order, each once.

    A text that a run reads again in a later epoch is still one text: counting it twice would leave no sequence that was
    seen only once, and those are what the smoothing is estimated from.
    """
    size = data.order.global_batch_size
    seen: set[int] = set()
    for start in range(0, samples, size):
        parts, ids = data.order.positions(start // size, 0, min(size, samples - start))
        keys = [key for key in dict.fromkeys(pack(parts, ids).tolist()) if key not in seen]
        seen.update(keys)
        if keys:
            yield data.source.get(np.array(keys, dtype=np.int64))


def all_windows(source: SampleSource) -> Iterator[Batch]:
    """Every window of a source, in order; of a mixture, every window of every part."""
    if isinstance(source, MixtureSource):
        for part in source.parts:
            yield from all_windows(part)
        return
    for start in range(0, len(source), _READ_WINDOWS):
        yield source.get(np.arange(start, min(start + _READ_WINDOWS, len(source)), dtype=np.int64))


def ngram_baselines(config: RunConfig, batch: ResolvedBatch, validation: Sequence[Batch],
                    token_bytes: np.ndarray | None, samples: int) -> list[NGramRecord]:
    """Unigram, bigram and trigram, at equal training tokens and on the full split.

    Args:
        config: of the run.
        batch: of the run; its size is part of the order of the data.
        validation: the very batches the model is evaluated on.
        token_bytes: [V] bytes of each token, for bits per byte; None: not known.
        samples: windows the model was trained on. At 0 there is no baseline at equal tokens.

    Returns:
        Three records a scope. A scope of more than `MAX_TOKENS` tokens, or of none, is left out with a warning.
    """
    vocab, masking, seq_len = config.model.vocab_size, config.data.document_masking, config.data.seq_len
    test, _ = read_predictions(validation, vocab, document_masking=masking)
    n_bytes = 0 if token_bytes is None else sum(label_bytes(held["labels"].numpy(), token_bytes)
                                                for held in validation)
    training = open_training(config, batch)
    whole = open_source(config.data.source, config.data.model_copy(update={"stride": None}))
    found = []
    for scope in _SCOPES:
        windows = samples if scope == "equal tokens" else n_windows(whole)
        if not 0 < windows * seq_len <= MAX_TOKENS:
            _log.warning("no n-gram baselines on %s: it has %d tokens, 1 to %d are counted", scope, windows * seq_len,
                         MAX_TOKENS)
            continue
        batches = trained_windows(training, samples) if scope == "equal tokens" else all_windows(whole)
        train, tokens = read_predictions(batches, vocab, document_masking=masking)
        for order in range(1, MAX_ORDER + 1):
            nll = NGramModel.fit(train, order, vocab).nll_sum(test)
            found.append(NGramRecord(order=order, scope=scope, train_tokens=tokens, loss=nll / len(test),
                                     perplexity=perplexity(nll / len(test)), n=len(test),
                                     bits_per_byte=bits_per_byte(nll, n_bytes) if n_bytes else None))
    return found


def n_windows(source: SampleSource) -> int:
    """Windows of a source; of a mixture, of all its parts."""
    return sum(map(n_windows, source.parts)) if isinstance(source, MixtureSource) else len(source)
