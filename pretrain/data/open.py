"""From a config to sources and the order of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.files import canonical_json
from data_prep.manifest import Manifest
from pretrain.config.needle import NeedleConfig
from pretrain.config.registry import SOURCES, resolve
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.config.source import DataConfig, PairsConfig, ShardsConfig, SourceConfig
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.curriculum import StagedOrder
from pretrain.data.loader import read_rows
from pretrain.data.mixture import MixtureSource, size_of
from pretrain.data.order import I64Array, Order
from pretrain.data.shards import IGNORE_LABEL
from pretrain.errors import ConfigError

VALIDATION_SPLIT = "val"
PADDING_ID = -1
"""`sample_ids` of rows that only fill up a batch of `eval_batches`."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains on, in which order."""

    source: SampleSource
    order: Order
    fingerprint: str
    """SHA-256 of everything that decides what batch k is. A run resumes only under the same one."""
    epoch_samples: int | None
    """Samples in an epoch; None for mixtures and sources without end."""

    def samples(self, n: int) -> Batch:
        """The first n samples of the run's order, [n, ...]; no cursor moves."""
        size = self.order.global_batch_size
        parts = [read_rows(self.source, self.order, at // size, 0, min(size, n - at)) for at in range(0, n, size)]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return Batch(torch.cat([part.sample_ids for part in parts]), tensors)


def open_source(config: SourceConfig, data: DataConfig) -> SampleSource:
    """The source that `config.kind` names. Raises what the source raises (UserError, DataCorruption)."""
    source: SampleSource = resolve(SOURCES, config.kind, "data.source.kind")(config, data)
    return source


def open_training(config: RunConfig, batch: ResolvedBatch) -> TrainingData:
    """Training source and global order of a run.

    Raises ConfigError where order, mixture, tokens and batch do not fit, UserError and DataCorruption from the source.
    """
    source = open_source(config.data.source, config.data)
    parts, keys = parts_of(source, "data.source")
    for part, key in zip(parts, keys, strict=True):
        check_tokens(part, key, config, like=parts[0], like_key=keys[0])
    stages = [(0, source.weights), *source.stages] if isinstance(source, MixtureSource) else [(0, [1.0])]
    order = StagedOrder.of([size_of(part) for part in parts], stages, global_batch_size=batch.global_batch_size,
                           seed=config.seed, order=config.data.order, period=getattr(source, "period", 1))
    fingerprint = order_fingerprint(source, config, batch.global_batch_size)
    return TrainingData(source, order, fingerprint, order.epoch_samples)


def order_fingerprint(source: SampleSource, config: RunConfig, global_batch_size: int) -> str:
    """SHA-256 over everything that decides what batch k is."""
    return hashlib.sha256(canonical_json({
        "source": source.fingerprint, "order": config.data.order.model_dump(mode="json"), "seed": config.seed,
        "global_batch_size": global_batch_size})).hexdigest()


def parts_of(source: SampleSource, key: str) -> tuple[list[SampleSource], list[str]]:
    """The sources that a source draws from, itself where it is no mixture, and their places in the config."""
    if isinstance(source, MixtureSource):
        return source.parts, [f"{key}.parts.{number}.source" for number in range(len(source.parts))]
    return [source], [key]


def check_tokens(source: object, key: str, config: RunConfig, *, like: object, like_key: str) -> None:
    """Raise ConfigError where ids of `source` are not in the model's vocabulary, or mean other tokens than `like`'s.

    Sources and manifests state `vocab_size` and `tokenizer_sha256`; what states neither is passed over.
    """
    ids, rows = getattr(source, "vocab_size", None), config.model.vocab_size
    if ids is not None and ids > rows:
        raise ConfigError("model.vocab_size", f"{rows} is too small for {key}, whose token ids go up to {ids - 1}; "
                          f"use {ids} or more, or the dataset that this model is for")
    mine, theirs = (getattr(each, "tokenizer_sha256", None) for each in (source, like))
    if mine and theirs and mine != theirs:
        raise ConfigError(key, f"was made with another tokenizer than {like_key} (SHA-256 {mine[:12]}, {theirs[:12]}): "
                          "equal ids are different tokens; prepare both with one tokenizer.path")


def open_validation(config: RunConfig) -> SampleSource | None:
    """The source of `data.validation`, else split `val` of the training dataset or needles, else None.

    Windows do not overlap, whatever `data.stride` and packing say of training: each token is counted once.
    """
    data = config.data.model_copy(update={"stride": None})
    training = data.source
    if data.validation is not None:
        validation = open_source(data.validation, data)
        like = Manifest.read(Path(training.path)) if isinstance(training, ShardsConfig | PairsConfig) else validation
        check_tokens(validation, "data.validation", config, like=like, like_key="data.source")
        return validation
    if isinstance(training, NeedleConfig) or (isinstance(training, ShardsConfig | PairsConfig)
                                              and VALIDATION_SPLIT in Manifest.load(training.path).splits):
        windows = {"packing": "none"} if isinstance(training, ShardsConfig) else {}
        return open_source(training.model_copy(update={"split": VALIDATION_SPLIT, **windows}), data)
    return None


def spread(count: int, most: int) -> I64Array:
    """Up to `most` of `count` places, evenly spaced: what is stored first is of one source."""
    taken = min(count, most)
    return np.arange(taken, dtype=np.int64) * count // max(1, taken)


def eval_batches(source: SampleSource, *, rank: int, world: int, batch_size: int,
                 max_samples: int | None = None) -> Iterator[Batch]:
    """Batches [batch_size] of this rank that together, over all ranks, hold every chosen sample exactly once.

    All ranks get the same number of batches. Rows that only fill up have `sample_ids` -1 and, where there are `labels`,
    labels of -100. With `max_samples` below the source's length the samples are those of `spread`.
    """
    length = len(source)
    n = min(length, max_samples or length)
    stride = world * batch_size
    for base in range(0, n, stride):
        index = base + rank * batch_size + np.arange(batch_size, dtype=np.int64)
        padding = index >= n
        ids = np.minimum(index, n - 1) * length // n
        batch = source.get(ids)
        if padding.any():
            rows = torch.from_numpy(padding)
            batch.sample_ids[rows] = PADDING_ID
            if "labels" in batch.tensors:
                batch.tensors["labels"][rows] = IGNORE_LABEL
        yield batch
