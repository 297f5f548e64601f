"""Digests of files: the same from the bytes that are written, from the file, and by many threads."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from pretrain.runfolder import hashing
from pretrain.runfolder.publish import MANIFEST, Manifest

SIZES = [0, 1, 99, 100, 101, 300, 1234]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 100)
    monkeypatch.setattr(hashing, "_SMALL", 10)


def content(size):
    return np.random.default_rng(size).bytes(size)


def plain(data):
    """By the rule, in one line."""
    pieces = [hashlib.sha256(data[at:at + 100]).hexdigest() for at in range(0, max(len(data), 1), 100)]
    return pieces[0] if len(pieces) == 1 else tuple(pieces)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 7, 100, 350, 5000])
def test_what_is_written_in_any_portions_has_the_digest_of_the_file(size, step, tmp_path):
    data = content(size)
    with ThreadPoolExecutor(3) as pool:
        hasher = hashing.PieceHasher(pool)
        for at in range(0, size, step):
            wait(hasher.update(memoryview(data[at:at + step])))
        assert hasher.digest() == plain(data)
    (tmp_path / "file").write_bytes(data)
    assert hashing.digest_of(tmp_path / "file") == plain(data)


def collected(folder):
    manifest = Manifest.collect(folder, {}, step=1, k=1, fence=1, world=1, stage=2, dtype="fp32")
    manifest.write(folder)
    return Manifest.read(folder)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for size in SIZES:
        (folder / f"file-{size}").write_bytes(content(size))
    return folder


def test_a_manifest_is_the_same_after_it_was_written_and_read(checkpoint):
    manifest = collected(checkpoint)
    assert manifest == Manifest.read(checkpoint)
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == \
        {f"file-{size}": plain(content(size)) for size in SIZES}
    assert manifest.verify(checkpoint) == []


@pytest.mark.parametrize("at", [0, 100, 250, 1233])
def test_a_changed_byte_in_any_piece_is_seen(checkpoint, at):
    manifest = collected(checkpoint)
    with open(checkpoint / "file-1234", "rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert manifest.verify(checkpoint) == [
        f"{checkpoint / 'file-1234'}: does not have the bytes that were written (SHA-256 differs)"]


def test_pieces_that_changed_places_are_seen(checkpoint):
    manifest = collected(checkpoint)
    data = content(1234)
    (checkpoint / "file-1234").write_bytes(data[100:200] + data[:100] + data[200:])
    assert len(manifest.verify(checkpoint)) == 1


def test_one_hash_of_a_large_file_is_still_read(checkpoint):
    """As manifests of format 1 have it."""
    collected(checkpoint)
    text = (checkpoint / MANIFEST).read_text()
    pieces = "".join(f'\n        "{piece}",' for piece in plain(content(1234))).rstrip(",")
    assert pieces in text
    whole = hashlib.sha256(content(1234)).hexdigest()
    text = text.replace(f"[{pieces}\n      ]", f'"{whole}"').replace('"format": 2', '"format": 1')
    (checkpoint / MANIFEST).write_text(text)
    manifest = Manifest.read(checkpoint)
    assert manifest.files["file-1234"].sha256 == whole
    assert manifest.verify(checkpoint) == []
    (checkpoint / "file-1234").write_bytes(content(1234)[::-1])
    assert len(manifest.verify(checkpoint)) == 1
