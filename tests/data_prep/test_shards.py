"""The shard format: webdataset reads it, our views equal what was pushed, bytes are reproducible, faults named."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.index import index_path
from data_prep.manifest import Manifest, write_manifest
from data_prep.shards import (
    CONTINUES,
    DOC_BYTES,
    DOC_FLAGS,
    DOC_HASH,
    DOC_START,
    ShardReader,
    ShardWriter,
    verify_shard,
)
from pretrain.errors import DataCorruption, UserError


def write_documents(folder, documents, *, block_tokens=16, blocks_per_shard=3, dtype="<u2"):
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "train", dtype=np.dtype(dtype), block_tokens=block_tokens,
                     blocks_per_shard=blocks_per_shard) as writer:
        for i, tokens in enumerate(documents):
            writer.push(np.asarray(tokens), utf8_bytes=7 * i, source=i % 2, doc_hash=-i,
                        provenance={"source": "s", "path": f"ä{i}.txt"})
    return write_manifest(folder, Manifest(tokenizer_sha256=None, dtype=dtype, block_tokens=block_tokens, eos_id=0,
                                           vocab_size=1000, splits={"train": writer.record}, provenance={}))


def random_documents(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, rng.integers(1, 60)) for _ in range(n)]


def test_stock_webdataset_yields_the_same_tokens_and_documents(tmp_path):
    documents = random_documents()
    split = write_documents(tmp_path, documents).split("train")
    urls = [str(split.tar_path(i)) for i in range(split.n_shards)]
    assert split.n_shards > 2
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len({s["__key__"] for s in samples}) == len(samples) == split.n_blocks
    np.testing.assert_array_equal(np.concatenate([s["tokens.npy"] for s in samples]), np.concatenate(documents))
    ours = [(ShardReader(split.tar_path(s)), b) for s in range(split.n_shards)
            for b in range(ShardReader(split.tar_path(s)).n_blocks)]
    for sample, (reader, block) in zip(samples, ours, strict=True):
        np.testing.assert_array_equal(sample["tokens.npy"], reader.tokens(block))
        np.testing.assert_array_equal(sample["docs.npy"], reader.docs(block))
        lines = [json.loads(line) for line in sample["prov.jsonl"].splitlines()]
        assert lines == reader.provenance(block)
        assert len(lines) == len(sample["docs.npy"])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 4))
def test_documents_are_recovered_from_their_rows(tmp_path_factory, lengths, block_tokens, blocks_per_shard):
    documents = [np.full(n, i + 1) for i, n in enumerate(lengths)]
    manifest = write_documents(tmp_path_factory.mktemp("d"), documents, block_tokens=block_tokens,
                               blocks_per_shard=blocks_per_shard)
    split = manifest.split("train")
    recovered: list[list[int]] = []
    for shard in range(split.n_shards):
        reader = ShardReader(split.tar_path(shard))
        for block in range(reader.n_blocks):
            tokens, docs = reader.tokens(block), reader.docs(block)
            assert len(tokens) == block_tokens or (shard, block) == (split.n_shards - 1, reader.n_blocks - 1)
            ends = [*docs[1:, DOC_START], len(tokens)]
            for row, end in zip(docs, ends, strict=True):
                if not row[DOC_FLAGS] & CONTINUES:
                    assert row[DOC_BYTES] == 7 * len(recovered)
                    assert row[DOC_HASH] == -len(recovered)
                    recovered.append([])
                recovered[-1] += tokens[row[DOC_START]:end].tolist()
    assert recovered == [d.tolist() for d in documents]
    assert (split.tokens, split.docs) == (sum(lengths), len(lengths))
    first = split.table["first_token"]
    for position in range(split.tokens):
        shard = split.shard_of(position)
        assert first[shard] <= position < first[shard] + split.table[shard]["tokens"]


def test_views_share_memory_with_the_map_and_are_read_only(tmp_path):
    split = write_documents(tmp_path, random_documents()).split("train")
    reader = ShardReader(split.tar_path(0))
    view = reader.tokens(1)
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, reader.tokens(1))


def test_bytes_are_reproducible_and_headers_are_neutral(tmp_path):
    first = write_documents(tmp_path / "a", random_documents())
    second = write_documents(tmp_path / "b", random_documents())
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert first.fingerprint == second.fingerprint
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.pax_headers == {}


def test_one_changed_token_changes_the_fingerprint(tmp_path):
    documents = random_documents()
    first = write_documents(tmp_path / "a", documents).fingerprint
    documents[-1][-1] ^= 1
    assert write_documents(tmp_path / "b", documents).fingerprint != first


def test_a_token_beyond_the_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        write_documents(tmp_path, [[70_000]])


def test_an_error_while_writing_leaves_no_shard(tmp_path):
    with pytest.raises(ValueError):
        write_documents(tmp_path, [[1, 2], []])
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, offset: int):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_each_fault_is_named(tmp_path):
    split = write_documents(tmp_path, random_documents()).split("train")
    tar, row = split.tar_path(1), split.table[1]
    whole, index = tar.read_bytes(), index_path(tar).read_bytes()
    assert verify_shard(tar, row) is None

    flip(tar, 700)
    assert "train-000001.tar: SHA-256" in verify_shard(tar, row)
    tar.write_bytes(whole[:-1024])
    assert "truncated" in verify_shard(tar, row)
    with pytest.raises(DataCorruption, match=r"train-000001\.tar"):
        Manifest.load(tmp_path)
    with pytest.raises(DataCorruption, match=r"train-000001\.tar"):
        ShardReader(tar)
    tar.unlink()
    assert "cannot be read" in verify_shard(tar, row)
    with pytest.raises(DataCorruption, match=r"train-000001\.tar: missing"):
        Manifest.load(tmp_path)
    tar.write_bytes(whole)

    flip(index_path(tar), 140)
    assert "train-000001.idx" in verify_shard(tar, row)
    with pytest.raises(DataCorruption, match=r"train-000001\.idx"):
        ShardReader(tar)
    index_path(tar).write_bytes(index_path(split.tar_path(0)).read_bytes())
    assert "index of another shard" in verify_shard(tar, row)
    index_path(tar).write_bytes(index)
    assert verify_shard(tar, row) is None


def test_tables_and_manifests_that_do_not_belong_are_refused(tmp_path):
    write_documents(tmp_path / "a", random_documents())
    write_documents(tmp_path / "b", random_documents(seed=1))
    mine = (tmp_path / "a" / "manifest.json").read_text()
    (tmp_path / "a" / "manifest.json").write_bytes((tmp_path / "b" / "manifest.json").read_bytes())
    with pytest.raises(DataCorruption, match="foreign manifest"):
        Manifest.load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(mine.replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        Manifest.load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(mine[:50])
    with pytest.raises(DataCorruption, match="not JSON"):
        Manifest.load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(mine)
    flip(tmp_path / "a" / "train.shards.bin", 9)
    with pytest.raises(DataCorruption, match=r"train\.shards\.bin"):
        Manifest.load(tmp_path / "a")
    with pytest.raises(UserError, match="no dataset here"):
        Manifest.load(tmp_path / "c")


def test_an_unknown_split_gets_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match='did you mean "train"'):
        write_documents(tmp_path, random_documents()).split("trian")
