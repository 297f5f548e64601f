"""Small prepared datasets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest, write_manifest
from data_prep.shards import ShardWriter, token_dtype


def write_dataset(folder: Path, splits: dict[str, Sequence[np.ndarray]], *, block_tokens: int = 16,
                  blocks_per_shard: int | None = None, vocab_size: int = 5000,
                  provenance: dict | None = None) -> Manifest:
    """A dataset of the given documents (each an array of ids) by split."""
    folder.mkdir(parents=True)
    records = {}
    for name, documents in splits.items():
        with ShardWriter(folder, name, dtype=token_dtype(vocab_size), block_tokens=block_tokens,
                         blocks_per_shard=blocks_per_shard) as writer:
            for number, tokens in enumerate(documents):
                writer.push(tokens, utf8_bytes=4 * len(tokens), source=0, doc_hash=number,
                            provenance=provenance or {"document": number})
        records[name] = writer.record
    return write_manifest(folder, Manifest(
        tokenizer_sha256=None, dtype="<u2" if vocab_size <= 1 << 16 else "<u4", block_tokens=block_tokens, eos_id=0,
        vocab_size=vocab_size, splits=records, provenance={}))


def counting_documents(lengths: Sequence[int], vocab_size: int = 5000) -> list[np.ndarray]:
    """Documents whose tokens together count 0, 1, 2, ..., so that a lost or doubled token has a name."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) % vocab_size for end, length in zip(ends, lengths, strict=True)]
