"""Samples without files: windows of a token array in memory, for tests, benchmarks and dry runs of the engine."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import canonical_json
from pretrain.config.source import DataConfig, SyntheticConfig
from pretrain.data.batch import Batch
from pretrain.errors import UserError


class ArraySource:
    """Windows of seq_len + 1 tokens of an array, from i * stride on; the whole array is one document."""

    def __init__(self, tokens: NDArray[Any], *, seq_len: int, stride: int | None = None) -> None:
        """`tokens`: [n] ids of any integer type; `stride` None means seq_len.

        Raises UserError where not one window fits.
        """
        if len(tokens) <= seq_len:
            raise UserError(f"{len(tokens)} tokens hold no window: data.seq_len {seq_len} needs {seq_len + 1}")
        self.seq_len, self.stride = seq_len, stride or seq_len
        self._tokens = tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens and the way they are cut."""
        digest = hashlib.sha256(np.ascontiguousarray(self._tokens, "<i8").tobytes())
        digest.update(canonical_json({"seq_len": self.seq_len, "stride": self.stride}))
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._tokens.max()) + 1

    def __len__(self) -> int:
        """Windows in the array."""
        return (len(self._tokens) - self.seq_len - 1) // self.stride + 1

    def get(self, sample_ids: NDArray[np.int64]) -> Batch:
        """input_ids and labels int64 [B, T], document_ids int32 [B, T] (all 0). Raises IndexError for unknown ids."""
        if sample_ids.size and (sample_ids.min() < 0 or sample_ids.max() >= len(self)):
            raise IndexError(f"windows {sample_ids.min()} to {sample_ids.max()} asked of a source that has {len(self)}")
        positions = (sample_ids * self.stride)[:, None] + np.arange(self.seq_len + 1)
        window = self._tokens[positions].astype(np.int64)
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), {
            "input_ids": torch.from_numpy(window[:, :-1].copy()),
            "labels": torch.from_numpy(window[:, 1:].copy()),
            "document_ids": torch.zeros(len(sample_ids), self.seq_len, dtype=torch.int32)})


def open_synthetic(config: SyntheticConfig, data: DataConfig) -> ArraySource:
    """`config.samples` windows of random ids, or of 0, 1, 2, ... modulo the vocabulary."""
    stride = data.stride or data.seq_len
    length = (config.samples - 1) * stride + data.seq_len + 1
    if config.pattern == "count":
        tokens = np.arange(length, dtype=np.int64) % config.vocab_size
    else:
        tokens = np.random.default_rng(config.seed).integers(0, config.vocab_size, length)
    return ArraySource(tokens, seq_len=data.seq_len, stride=data.stride)
