"""Whole documents side by side: samples by a packing plan instead of windows.

Every document keeps its beginning; only one longer than a sample is cut. What stays empty at the end of a sample holds
the end-of-text id, labels of -100 and a document number of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import canonical_json
from data_prep.manifest import Manifest
from data_prep.packing import load_plan
from data_prep.shards import DOC_START, ShardReader
from pretrain.data.batch import Batch
from pretrain.data.shards import IGNORE_LABEL
from pretrain.data.stored import StoredSplit, Verify


class PackedSource(StoredSplit[ShardReader]):
    """The samples of a packing plan."""

    def __init__(self, manifest: Manifest, split: str, *, seq_len: int, verify: Verify = "auto") -> None:
        """Open a split of a loaded manifest and its plan for `seq_len`.

        Raises:
            UserError: no such split, or no plan for it and this length.
            DataCorruption: a damaged plan; with full verification, the first shard whose hash is not the recorded one.
        """
        manifest.require("documents")
        super().__init__(manifest, split)
        self.seq_len, self.plan = seq_len, load_plan(manifest, split, seq_len)
        self._trust(verify)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's fingerprint and the plan."""
        return hashlib.sha256(canonical_json({
            "kind": "packed", "dataset": self.manifest.fingerprint, "split": self.split.name,
            "plan": self.plan.sha256})).hexdigest()

    def __len__(self) -> int:
        """Samples of the plan."""
        return self.plan.samples

    def get(self, sample_ids: NDArray[np.int64]) -> Batch:
        """Samples [B] as tensors [B, T]: input_ids and labels int64, document_ids int32.

        Raises IndexError for unknown ids, DataCorruption for a shard that fails its check at first use.
        """
        self._require_ids(sample_ids, len(self), "samples")
        shape = (len(sample_ids), self.seq_len)
        inputs = np.full(shape, self.manifest.eos_id, np.int64)
        labels = np.full(shape, IGNORE_LABEL, np.int64)
        documents = np.zeros(shape, np.int32)
        for row, sample in enumerate(sample_ids.tolist()):
            at = 0
            begin, end = self.plan.starts[sample:sample + 2].tolist()
            for number, (first, places) in enumerate(self.plan.pieces[begin:end].tolist()):
                tokens = self._tokens(first, places + 1)
                inputs[row, at:at + places], labels[row, at:at + places] = tokens[:-1], tokens[1:]
                documents[row, at:at + places] = number
                at += places
            documents[row, at:] = end - begin
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), {
            "input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(documents)})

    def _tokens(self, first: int, count: int) -> NDArray[np.int64]:
        """[count] tokens of the split from position `first` on, across blocks and shards."""
        found = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            shard = self.split.shard_of(first + filled)
            block, offset = divmod(first + filled - int(self._first_item[shard]), self.split.block_tokens)
            piece = self._opened(shard).tokens(block)[offset:offset + count - filled]
            found[filled:filled + len(piece)] = piece
            filled += len(piece)
        return found

    def provenance(self, sample_id: int) -> list[dict[str, Any]]:
        """Where each document that a sample holds a piece of came from, in the order of the sample."""
        begin, end = self.plan.starts[sample_id:sample_id + 2].tolist()
        found: list[dict[str, Any]] = []
        for first in self.plan.pieces["first_token"][begin:end].tolist():
            shard = self.split.shard_of(first)
            block, offset = divmod(first - int(self._first_item[shard]), self.split.block_tokens)
            reader = self._opened(shard)
            at = int(np.searchsorted(reader.docs(block)[:, DOC_START], offset, side="right")) - 1
            found.append(reader.provenance(block)[at])
        return found

    def _map(self, tar_path: Path) -> ShardReader:
        return ShardReader(tar_path)
