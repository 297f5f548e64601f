"""Pairs of a prepared dataset as samples: query, positive and a drawn number of negatives, padded to fixed lengths.

The shards hold texts without special tokens; the ids that the tokenizer's own post-processor puts around a text
([CLS] and [SEP], or the end of text) stand in the manifest and are added here, so that cutting a text to any length
never costs them. Rows have one width a side, the configured length rounded up to a multiple of 8: what a sample looks
like then depends on nothing but its id, and batches of several parts of a mixture fit. `trim` takes off the columns
that are padding in every row.
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
from data_prep.pairs import PairBlock, PairReader
from pretrain.config.source import DataConfig, PairsConfig
from pretrain.data.batch import Batch
from pretrain.data.bijection import U64Array, as_keys, derive, permute, stream_key
from pretrain.data.stored import StoredSplit
from pretrain.errors import UserError

WIDTH_MULTIPLE = 8
"""Widths are multiples of this, which tensor cores like."""


class PairSource(StoredSplit[PairReader]):
    """The pairs of one split as samples; sample i is pair i of the split."""

    def __init__(self, manifest: Manifest, config: PairsConfig) -> None:
        """Open a split of a loaded manifest.

        Raises:
            UserError: a dataset of documents, no such split, an empty one, or lengths that leave no room for a token.
            DataCorruption: with full verification, the first shard whose hash is not the recorded one.
        """
        manifest.require("pairs")
        assert manifest.pairs is not None
        super().__init__(manifest, config.split)
        self.config, self._stored = config, manifest.pairs
        if self.split.docs == 0:
            raise UserError(f'{manifest.folder}: split "{config.split}" has no pairs; prepare more or give it a share')
        special = len(self._stored.prefix_ids) + len(self._stored.suffix_ids)
        if min(config.query_length, config.passage_length) <= special:
            raise UserError(f"{manifest.folder}: the tokenizer puts {special} tokens around each text; query_length "
                            f"{config.query_length} and passage_length {config.passage_length} must be longer")
        self._negatives_key = as_keys(stream_key("pairs/negatives", config.seed))
        self._trust(config.verify)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's fingerprint and what of it a sample shows."""
        return hashlib.sha256(canonical_json({
            "kind": "pairs", "dataset": self.manifest.fingerprint,
            **self.config.model_dump(mode="json", exclude={"kind", "path", "verify"})})).hexdigest()

    def __len__(self) -> int:
        """Pairs in the split."""
        return self.split.docs

    def get(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The pairs [B], with N negatives each and widths Tq and Tp.

        Tensors: `query_input_ids`, `query_attention_mask` [B, Tq]; `positive_input_ids`, `positive_attention_mask`
        [B, Tp]; `query_ids`, `passage_ids` int64 [B], equal where the texts are, for the masking of false negatives;
        with N > 0 also `negative_input_ids`, `negative_attention_mask` [B, N, Tp], `negative_ids` int64 [B, N] and
        `negative_mask` bool [B, N], which is false where the pair has fewer than N negatives. All ids are int64 and all
        attention masks bool.

        Raises IndexError for unknown ids, DataCorruption for a shard that fails its check at first use.
        """
        return self.get_in_epoch(sample_ids, np.zeros_like(sample_ids))

    def get_in_epoch(self, sample_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The pairs with the negatives that are theirs in epochs [B]; see `get`."""
        self._require_ids(sample_ids, len(self), "pairs")
        n, count = self.config.negatives_per_query, len(sample_ids)
        queries = _Rows(count, self.config.query_length, self._stored.pad_id)
        positives = _Rows(count, self.config.passage_length, self._stored.pad_id)
        negatives = _Rows(count * n, self.config.passage_length, self._stored.pad_id)
        ids = np.zeros((count, 2), np.uint64)
        negative_ids = np.zeros((count, n), np.uint64)
        shards = np.searchsorted(self._first_item, sample_ids, side="right") - 1
        places = sample_ids - self._first_item[shards]
        keys = derive(derive(self._negatives_key, epochs.astype(np.uint64)), sample_ids.astype(np.uint64))
        for row, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            number, at = divmod(place, self.split.block_pairs)
            block = self._opened(shard).block(number)
            self._put(queries, row, block.text("q", at))
            self._put(positives, row, block.text("p", at))
            ids[row] = block.ids[at]
            for column, drawn in enumerate(self._draw(keys[row:row + 1], block, at)):
                self._put(negatives, row * n + column, block.text("n", drawn))
                negative_ids[row, column] = block.n_ids[drawn]
        tensors = {**queries.tensors("query", (count,)), **positives.tensors("positive", (count,)),
                   "query_ids": torch.from_numpy(ids[:, 0].copy().view(np.int64)),
                   "passage_ids": torch.from_numpy(ids[:, 1].copy().view(np.int64))}
        if n:
            tensors |= negatives.tensors("negative", (count, n))
            tensors["negative_ids"] = torch.from_numpy(negative_ids.view(np.int64))
            tensors["negative_mask"] = tensors["negative_attention_mask"].any(-1)
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), tensors)

    def _draw(self, key: U64Array, block: PairBlock, at: int) -> list[int]:
        """Negatives of a pair, without replacement, in an order that `key` [1] decides."""
        first, stop = block.n_offsets[at:at + 2].tolist()
        available, wanted = stop - first, min(self.config.negatives_per_query, stop - first)
        if wanted == 0:
            return []
        drawn: list[int] = permute(np.arange(wanted, dtype=np.uint64), available, key).astype(np.int64).tolist()
        return [first + number for number in drawn]

    def _put(self, rows: _Rows, row: int, text: NDArray[Any]) -> None:
        rows.put(row, text, self._stored.prefix_ids, self._stored.suffix_ids)

    def _map(self, tar_path: Path) -> PairReader:
        return PairReader(tar_path)

    def provenance(self, sample_id: int) -> list[dict[str, Any]]:
        """Where a pair came from, as a list of one."""
        shard = int(np.searchsorted(self._first_item, sample_id, side="right")) - 1
        number, at = divmod(sample_id - int(self._first_item[shard]), self.split.block_pairs)
        return [self._opened(shard).provenance(number)[at]]


class _Rows:
    """Padded rows of one side while they are filled."""

    def __init__(self, rows: int, length: int, pad_id: int) -> None:
        width = -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.length = length
        self.ids = np.full((rows, width), pad_id, np.int64)
        self.mask = np.zeros((rows, width), np.bool_)

    def put(self, row: int, text: NDArray[Any], prefix: list[int], suffix: list[int]) -> None:
        """prefix + text + suffix, the text cut to fit `length`."""
        kept = text[:self.length - len(prefix) - len(suffix)]
        begin, end = len(prefix), len(prefix) + len(kept)
        self.ids[row, :begin] = prefix
        self.ids[row, begin:end] = kept
        self.ids[row, end:end + len(suffix)] = suffix
        self.mask[row, :end + len(suffix)] = True

    def tensors(self, side: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """`SIDE_input_ids` and `SIDE_attention_mask`, [*shape, width]."""
        return {f"{side}_input_ids": torch.from_numpy(self.ids.reshape(*shape, -1)),
                f"{side}_attention_mask": torch.from_numpy(self.mask.reshape(*shape, -1))}


def trim(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of [..., T] ids and mask without the last columns that are padding in all rows; T stays a multiple of 8."""
    used = attention_mask.reshape(-1, attention_mask.shape[-1]).any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    width = min(attention_mask.shape[-1], -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
    return input_ids[..., :width], attention_mask[..., :width]


def open_pairs(config: PairsConfig, data: DataConfig) -> PairSource:
    """Open a dataset folder of pairs; `data.seq_len` and `data.stride` mean nothing here.

    Raises UserError where there is no dataset or split of pairs, DataCorruption naming the first file found wrong.
    """
    return PairSource(Manifest.load(Path(config.path)), config)
