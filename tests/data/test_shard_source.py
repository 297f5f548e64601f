"""Windows of shards against a naive reading of the same documents, and what happens to damaged files."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import counting_documents, write_dataset

from pretrain.config.source import DataConfig, ShardsConfig
from pretrain.data import stored
from pretrain.data.shards import ShardSource, open_shards
from pretrain.errors import DataCorruption, UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def naive(documents, seq_len, stride, masking):
    """All windows with labels and document ids, token by token from the plain list of documents."""
    tokens = [int(t) for document in documents for t in document]
    owner = [number for number, document in enumerate(documents) for _ in document]
    windows = []
    for begin in range(0, len(tokens) - seq_len, stride):
        at = range(begin, begin + seq_len)
        labels = [tokens[i + 1] if not masking or owner[i + 1] == owner[i] else -100 for i in at]
        windows.append(([tokens[i] for i in at], labels, [owner[i] - owner[begin] for i in at]))
    return windows


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lengths=LENGTHS, seq_len=st.integers(2, 50), stride=st.none() | st.integers(1, 60), masking=st.booleans(),
       block_tokens=st.integers(1, 20), blocks_per_shard=st.integers(1, 4), wide=st.booleans())
def test_windows_equal_a_naive_reading(tmp_path_factory, lengths, seq_len, stride, masking, block_tokens,
                                       blocks_per_shard, wide):
    documents = counting_documents(lengths)
    folder = tmp_path_factory.mktemp("case") / "dataset"
    manifest = write_dataset(folder, {"train": documents}, block_tokens=block_tokens,
                             blocks_per_shard=blocks_per_shard, vocab_size=70_000 if wide else 5000)
    expected = naive(documents, seq_len, stride or seq_len, masking)
    if not expected:
        with pytest.raises(UserError, match=f"has {sum(lengths)} tokens"):
            ShardSource(manifest, "train", seq_len=seq_len, stride=stride)
        return
    source = ShardSource(manifest, "train", seq_len=seq_len, stride=stride, document_masking=masking)
    assert len(source) == len(expected)
    ids = np.random.default_rng(0).permutation(len(source))
    batch = source.get(ids)
    for row, window in enumerate(ids.tolist()):
        input_ids, labels, document_ids = expected[window]
        assert batch["input_ids"][row].tolist() == input_ids
        assert batch["labels"][row].tolist() == labels
        assert batch["document_ids"][row].tolist() == document_ids
    shutil.rmtree(folder)


def test_types_and_bounds(dataset):
    source = ShardSource(dataset([30, 30]), "train", seq_len=8)
    batch = source.get(np.array([3, 0]))
    assert batch.sample_ids.tolist() == [3, 0]
    assert {name: (str(t.dtype), tuple(t.shape), t.is_contiguous()) for name, t in batch.tensors.items()} == {
        "input_ids": ("torch.int64", (2, 8), True), "labels": ("torch.int64", (2, 8), True),
        "document_ids": ("torch.int32", (2, 8), True)}
    for bad in (-1, 7):
        with pytest.raises(IndexError):
            source.get(np.array([0, bad]))


def test_open_maps_are_bounded(dataset, monkeypatch):
    monkeypatch.setattr(stored, "MAX_OPEN_SHARDS", 3)
    source = ShardSource(dataset([200], block_tokens=8, blocks_per_shard=1), "train", seq_len=4)
    ids = np.random.default_rng(1).integers(0, len(source), 200)
    assert source.get(ids)["input_ids"][:, 0].tolist() == (ids * 4).tolist()
    assert len(source._open) == 3


def test_a_pickled_source_reads_the_same(dataset):
    source = ShardSource(dataset([90]), "train", seq_len=8)
    source.get(np.arange(3))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.get(np.arange(11))["labels"].tolist() == source.get(np.arange(11))["labels"].tolist()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def open_with(manifest, verify):
    return open_shards(ShardsConfig(path=str(manifest.folder), verify=verify),
                       DataConfig(seq_len=8, source=ShardsConfig(path=str(manifest.folder))))


@pytest.mark.parametrize("verify", ["full", "auto"])
def test_flipped_byte_is_found_before_the_first_batch(dataset, verify):
    manifest = dataset([400], block_tokens=16, blocks_per_shard=5)
    flip_byte(manifest.folder / "train-000003.tar")
    with pytest.raises(DataCorruption, match=r"train-000003\.tar: SHA-256"):
        open_with(manifest, verify)


def test_flipped_byte_is_found_at_first_touch(dataset, monkeypatch):
    manifest = dataset([400], block_tokens=16, blocks_per_shard=5)
    flip_byte(manifest.folder / "train-000003.tar")
    monkeypatch.setattr(stored, "FULL_VERIFY_BYTES", 10)
    for verify in ("touch", "auto"):
        source = open_with(manifest, verify)
        source.get(np.arange(29))  # tokens 0 to 232 of shards 0, 1, 2
        with pytest.raises(DataCorruption, match=r"train-000003\.tar: SHA-256"):
            source.get(np.array([31]))
    assert open_with(manifest, "off").get(np.array([31])) is not None


def test_each_shard_is_hashed_once_for_all_loader_processes(dataset, monkeypatch):
    hashed = []
    verify_shard = stored.verify_shard
    monkeypatch.setattr(stored, "verify_shard", lambda path, *rest: hashed.append(path.name) or
                        verify_shard(path, *rest))
    monkeypatch.setattr(stored, "MAX_OPEN_SHARDS", 1)
    source = open_with(dataset([400], block_tokens=16, blocks_per_shard=5), "touch")
    child = os.fork()
    if child == 0:
        source.get(np.arange(12))
        os._exit(0)
    os.waitpid(child, 0)
    source.get(np.arange(49))
    source.get(np.arange(49))
    assert hashed == ["train-000002.tar", "train-000003.tar", "train-000004.tar"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "table"])
@pytest.mark.parametrize("verify", ["off", "touch", "full"])
def test_sizes_and_tables_are_always_checked(dataset, damage, verify):
    manifest = dataset([400], block_tokens=16, blocks_per_shard=5)
    path = manifest.folder / ("train.shards.bin" if damage == "table" else "train-000001.tar")
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 512)
    elif damage == "remove":
        path.unlink()
    else:
        flip_byte(path)
    with pytest.raises(DataCorruption, match=path.name):
        open_with(manifest, verify)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_of_many_shards_the_files_are_looked_at_when_first_used(dataset, damage, monkeypatch):
    manifest = dataset([400], block_tokens=16, blocks_per_shard=5)
    monkeypatch.setattr("data_prep.manifest.LOOKED_AT", 3)  # shards 0, 2, 4
    monkeypatch.setattr(stored, "LOOKED_AT", 3)
    paths = [manifest.folder / f"train-00000{number}.tar" for number in (1, 2)]
    content = paths[0].read_bytes()
    for path in paths:
        if damage == "truncate":
            os.truncate(path, path.stat().st_size - 512)
        else:
            path.unlink()
        if path == paths[0]:
            source = open_with(manifest, "off")
            source.get(np.arange(9))
            with pytest.raises(DataCorruption, match=path.name):
                source.get(np.array([11]))
            path.write_bytes(content)
    with pytest.raises(DataCorruption, match=paths[1].name):
        open_with(manifest, "off")


def test_wrong_folder_and_split_are_user_errors(dataset, tmp_path):
    with pytest.raises(UserError, match="no dataset here"):
        open_shards(ShardsConfig(path=str(tmp_path / "none")), DataConfig(source=ShardsConfig(path="x")))
    with pytest.raises(UserError, match='no split "trian" \\(did you mean "train"'):
        ShardSource(dataset([90]), "trian", seq_len=8)


def test_fingerprint_covers_content_and_cut_but_not_the_place(dataset, tmp_path):
    manifest = dataset([90, 31])
    base = ShardSource(manifest, "train", seq_len=8).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(manifest.folder, moved)
    assert ShardSource(manifest.load(moved), "train", seq_len=8, stride=8).fingerprint == base
    others = [ShardSource(manifest, "train", seq_len=9), ShardSource(manifest, "train", seq_len=8, stride=4),
              ShardSource(manifest, "train", seq_len=8, document_masking=False),
              ShardSource(dataset([90, 32]), "train", seq_len=8)]
    assert len({base, *(source.fingerprint for source in others)}) == 5


def test_provenance_names_the_documents_of_a_window(dataset):
    source = ShardSource(dataset([10, 3, 20, 7, 60], block_tokens=25), "train", seq_len=12)
    assert [d["document"] for d in source.provenance(0)] == [0, 1]
    assert [d["document"] for d in source.provenance(1)] == [1, 2]
    assert [d["document"] for d in source.provenance(2)] == [2, 3]  # across the edge of a block
