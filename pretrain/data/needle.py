"""Needles in a haystack, drawn by counters: example i of a split is a pure function of (seed, split, i).

Nothing is stored: any example is made at once and in any order, so the stream has no end, resumes anywhere and reads
the same at every world size. Every draw hashes (key of the split, example, stream, place); see `bijection`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import canonical_json
from data_prep.manifest import Manifest
from pretrain.config.needle import KEY_LEN, QUERY_LEN, NeedleConfig
from pretrain.config.source import DataConfig
from pretrain.data.batch import Batch
from pretrain.data.bijection import U64Array, as_keys, derive, permute, stream_key
from pretrain.data.shards import IGNORE_LABEL, ShardSource
from pretrain.errors import ConfigError

I64Array = NDArray[np.int64]
_HIGH = np.uint64(32)
_IDS, _HAYSTACK, _PLACE, _CHOICE = (np.array([n], np.uint64) for n in range(4))
"""Streams of an example."""


@dataclass(frozen=True, slots=True)
class NeedleRows:
    """Whole examples. N rows, C context, L needle."""

    tokens: I64Array
    """[N, C + 6 + L] context, query, needle; without a query the context alone, [N, C]."""
    needle: I64Array
    """[N, L] the needle that is asked for."""
    start: I64Array
    """[N] place of its first token in the context."""
    spare: I64Array
    """[N, L + 6] pool ids that stand in no needle and no key of the row; controls draw on them."""


class NeedleSource:
    """The examples of one split behind `SampleSource`."""

    def __init__(self, config: NeedleConfig) -> None:
        """Raises UserError, DataCorruption and ConfigError where the text of a haystack cannot be used."""
        self.config = config
        self.vocab_size = config.vocab_size
        # Evaluation examples are the same for all seeds: runs are then compared on equal terms.
        self._key = as_keys(stream_key("needle", config.seed if config.split == "train" else 0, config.split))
        self._text = _open_text(config) if config.haystack == "shards" else None

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the haystack's text; None for drawn ids."""
        return self._text.manifest.tokenizer_sha256 if self._text else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parameters and the text of the haystack."""
        values = self.config.model_dump(mode="json", exclude=set(self.config.changeable))
        text = self._text.fingerprint if self._text else None
        return hashlib.sha256(canonical_json({"source": values, "size": self._size, "text": text})).hexdigest()

    def __len__(self) -> int:
        """Examples of the split. Raises TypeError for a stream."""
        if not self._size:
            raise TypeError("the training stream of needles has no end")
        return self._size

    @property
    def _size(self) -> int:
        config = self.config
        return {"train": config.needle_train_size, "val": config.needle_eval_examples,
                "test": config.needle_test_examples}[config.split]

    def get(self, sample_ids: I64Array) -> Batch:
        """Examples as a model takes them, T = `config.seq_len`.

        `input_ids` int64 [B, T]; `labels` int64 [B, T], the next token at the L rows that predict the needle and -100
        elsewhere; `readout_positions` int64 [B, L], those rows; `needle_start` int64 [B]; `pool` int64 [B, 2], the
        range of ids that negatives come from. Without a query every position has a label and nothing is read out.
        """
        rows = self.rows(sample_ids)
        config, count = self.config, len(sample_ids)
        labels = rows.tokens[:, 1:].copy()
        tensors = {"input_ids": torch.from_numpy(rows.tokens[:, :-1].copy()), "labels": torch.from_numpy(labels),
                   "needle_start": torch.from_numpy(rows.start),
                   "pool": torch.tensor([[config.pool_low, config.pool_high]]).repeat(count, 1)}
        if config.needle_query:
            first = config.retrieval_start - 1
            labels[:, :first] = IGNORE_LABEL
            positions = torch.arange(first, first + config.needle_len)
            tensors["readout_positions"] = positions.repeat(count, 1)
        return Batch(torch.from_numpy(sample_ids.astype(np.int64)), tensors)

    def rows(self, sample_ids: I64Array) -> NeedleRows:
        """Examples in parts."""
        config, ids = self.config, sample_ids.astype(np.uint64)
        keys = derive(self._key, ids)
        length, key_len = config.needle_len, KEY_LEN if config.has_key else 0
        blocks = self._blocks(keys)
        text = self._windows(ids) if self._text else None
        drawn = self._distinct(keys, config.needles * (key_len + length) + length + QUERY_LEN, text)
        named, spare = np.split(drawn, [config.needles * (key_len + length)], axis=1)
        # [N, needles, key + L]: key and needle of each block
        named = named.reshape(len(ids), config.needles, key_len + length)
        context = text if text is not None else self._iid(keys, named[:, :, key_len:].reshape(len(ids), -1))
        block = named = named + config.pool_low
        if config.needle_marker in ("tag", "tagkey"):
            block = np.concatenate([np.full((*named.shape[:2], 1), config.tag_id), named], axis=2)
        places = blocks[:, :, None] + np.arange(block.shape[2])
        np.put_along_axis(context, places.reshape(len(ids), -1), block.reshape(len(ids), -1), axis=1)
        chosen = below(derive(keys, _CHOICE), config.needles)
        row = np.arange(len(ids))
        own = named[row, chosen]
        tokens = context
        if config.needle_query:
            tokens = np.concatenate([context, self.query(own[:, :key_len]), own[:, key_len:]], axis=1)
        return NeedleRows(tokens, own[:, key_len:], blocks[row, chosen] + config.marker_len, spare + config.pool_low)

    def query(self, key: I64Array) -> I64Array:
        """[N, 6] of keys [N, 4], or the fixed one for [N, 0]."""
        query = np.tile(np.array(self.config.query_ids, np.int64), (len(key), 1))
        if key.shape[1]:
            query[:, -KEY_LEN:] = key
        return query

    def _blocks(self, keys: U64Array) -> I64Array:
        """[N, needles] first place of each block of marker and needle."""
        config = self.config
        if config.needles == 1:
            low, high = config.start_range
            return (low + below(derive(keys, _PLACE), high - low + 1) - config.marker_len)[:, None]
        size = config.marker_len + config.needle_len
        free = config.context_len - config.needles * size
        places = derive(derive(keys, _PLACE)[:, None], np.arange(config.needles, dtype=np.uint64))
        return np.sort(below(places, free + 1), axis=1) + size * np.arange(config.needles)

    def _distinct(self, keys: U64Array, count: int, text: I64Array | None) -> I64Array:
        """[N, count] different places in the pool for each row, none of them a token of the row's text."""
        size, id_keys = self.config.pool_size, derive(keys, _IDS)
        candidates = _first(id_keys, count, size)
        if text is None or self.config.haystack_repeats:
            return candidates
        taken = np.zeros((len(keys), size), np.bool_)
        rows, columns = np.nonzero((text >= self.config.pool_low) & (text < self.config.pool_high))
        taken[rows, text[rows, columns] - self.config.pool_low] = True
        for row in np.flatnonzero(np.take_along_axis(taken, candidates, 1).any(axis=1)).tolist():
            order = _first(id_keys[row:row + 1], size, size)[0]
            free = order[~taken[row, order]]
            if len(free) < count:
                raise ConfigError("data.source.pool_margin", f"a window of {self.config.haystack_path} leaves "
                                  f"{len(free)} ids of the pool unused, needles and keys need {count}; lower it, or "
                                  "set data.source.haystack_repeats")
            candidates[row] = free[:count]
        return candidates

    def _iid(self, keys: U64Array, needles: I64Array) -> I64Array:
        """[N, C] ids, uniform over the pool without the `needles` (places in it)."""
        config = self.config
        hashes = derive(derive(keys, _HAYSTACK)[:, None], np.arange(config.context_len, dtype=np.uint64))
        excluded = needles[:, :0] if config.haystack_repeats else np.sort(needles, axis=1)
        return config.pool_low + skip(below(hashes, config.pool_size - excluded.shape[1]), excluded)

    def _windows(self, ids: U64Array) -> I64Array:
        """[N, C] ids of real text; each window comes once before any comes twice."""
        assert self._text is not None
        size = len(self._text)
        epochs, places = np.divmod(ids, np.uint64(size))
        order = permute(places, size, derive(derive(self._key, _HAYSTACK), epochs))
        return self._text.get(order.astype(np.int64))["input_ids"].numpy()


def below(hashes: U64Array, n: int) -> I64Array:
    """Uniform integers in [0, n) from hashes; n is at most 2**32."""
    return ((hashes >> _HIGH) * np.uint64(n) >> _HIGH).astype(np.int64)


def skip(values: I64Array, excluded: I64Array) -> I64Array:
    """Map [N, K] values of [0, n - x) onto [0, n) without the x sorted numbers [N, x] of each row, in order."""
    shifted = excluded - np.arange(excluded.shape[1])
    result = values.copy()
    for column in range(excluded.shape[1]):
        result += values >= shifted[:, column:column + 1]
    return result


def _first(keys: U64Array, count: int, size: int) -> I64Array:
    """[N, count] the first images of a bijection of [0, size) with a key a row: different numbers."""
    x = np.tile(np.arange(count, dtype=np.uint64), len(keys))
    return permute(x, size, np.repeat(keys, count)).astype(np.int64).reshape(len(keys), count)


def _open_text(config: NeedleConfig) -> ShardSource:
    """Windows of C tokens of the dataset; evaluation splits read its split val."""
    manifest = Manifest.load(Path(str(config.haystack_path)))
    if manifest.vocab_size > config.vocab_size:
        raise ConfigError("data.source.vocab_size", f"{config.vocab_size} is too small for {config.haystack_path}, "
                          f"whose token ids go up to {manifest.vocab_size - 1}")
    return ShardSource(manifest, "train" if config.split == "train" else "val", seq_len=config.context_len,
                       verify=config.verify)


def open_needle(config: NeedleConfig, data: DataConfig) -> NeedleSource:
    """The examples of `config.split`. Raises what a haystack's dataset raises."""
    return NeedleSource(config)
