"""What a rank writes of a checkpoint, without a process group: bytes, hashes, and disks that refuse."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.capture import _Taker
from pretrain.engine.nonfinite import Examiner
from pretrain.engine.writing import PartFile, TensorFile, TextFile, TorchFile, Writing
from pretrain.errors import UserError
from pretrain.runfolder.publish import hash_file

LIMIT = 1 << 20


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the write that crosses it is cut short, the next fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(elements: int) -> dict[str, Any]:
    big = torch.arange(elements, dtype=torch.float32)
    return {"big": big, "small": torch.ones(3), "again": big, "words": ["a", ("b", 1.5)]}


def parts(elements: int) -> list[PartFile]:
    value = state(elements)
    return [TextFile("state.json", '{"k": "é"}\n'), TorchFile("deepspeed/weights.pt", value, 4 * elements),
            TensorFile("extra.safetensors", {"x": torch.ones(5)})]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deepspeed").mkdir()
    return tmp_path


def test_the_hash_is_that_of_the_file_and_the_file_holds_the_state(folder: Path) -> None:
    writing = Writing(folder, parts(3_000_000), beside=False)
    assert writing.wait(60)
    assert not writing.failed
    hashes = writing.hashes()
    assert hashes == {name: hash_file(folder / name) for name in ("state.json", "deepspeed/weights.pt",
                                                                 "extra.safetensors")}
    found = torch.load(folder / "deepspeed/weights.pt", mmap=True, weights_only=True)
    assert torch.equal(found["big"], state(3_000_000)["big"])
    assert found["big"].data_ptr() == found["again"].data_ptr()
    assert found["words"] == ["a", ("b", 1.5)]
    assert torch.equal(load_file(folder / "extra.safetensors")["x"], torch.ones(5))
    assert (folder / "state.json").read_text() == '{"k": "é"}\n'
    assert writing.unwritten == 0
    assert writing.progress > 0


@pytest.mark.parametrize("big", ["torch", "safetensors", "text"])
def test_a_disk_that_refuses_in_the_middle_of_a_file_is_one_line(folder: Path, big: str) -> None:
    tensor = torch.zeros(LIMIT)
    file = {"torch": TorchFile("deepspeed/big.pt", {"x": tensor}, tensor.nbytes),
            "safetensors": TensorFile("deepspeed/big.pt", {"x": tensor}),
            "text": TextFile("deepspeed/big.pt", "x" * 4 * LIMIT)}[big]
    last = TensorFile("last.safetensors", {"x": torch.ones(100)})
    with files_up_to(LIMIT):
        writing = Writing(folder, [TextFile("first.json", "{}"), file, last], beside=False)
        assert writing.wait(60)
        assert writing.failed
    assert not (folder / "last.safetensors").exists()
    there = LIMIT if (folder / "deepspeed/big.pt").exists() else 0
    assert writing.unwritten == 4 * LIMIT - there + 400
    writing.explain(writing.unwritten)
    with pytest.raises(UserError) as told:
        writing.hashes()
    assert str(told.value) == (f"{folder}/deepspeed/big.pt: cannot be written ({os.strerror(errno.EFBIG)}); "
                               "checkpoints before this one stand as they were")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_what_it_lacks(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pretrain.engine.writing.os.fsync", refuse)
    writing = Writing(folder, parts(1000), beside=False)
    assert writing.wait(60)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    writing.explain(free + 10**12)
    with pytest.raises(UserError, match=r"state\.json: cannot be written .*: [\d,]+ more bytes are needed there; make "
                       r"room, or keep fewer checkpoints \(checkpoint.keep_last\)") as told:
        writing.hashes()
    missing = int(str(told.value).partition("): ")[2].partition(" more")[0].replace(",", ""))
    assert missing == pytest.approx(10**12, rel=0.05)  # other processes use the disk meanwhile


def test_a_mistake_of_the_program_stays_what_it_is(folder: Path) -> None:
    writing = Writing(folder, [TorchFile("deepspeed/x.pt", lambda: None, 0)], beside=False)
    assert writing.wait(60)
    writing.explain(0)
    with pytest.raises(Exception, match=r"pickle"):
        writing.hashes()


@pytest.mark.parametrize("to_host", [False, True])
def test_what_is_taken_is_written_as_small_as_it_is(folder: Path, to_host: bool) -> None:
    """Slices of a large buffer without the buffer, tied weights once, non-contiguous ones in order."""
    buffer = torch.arange(1_000_000, dtype=torch.float32)
    tied = torch.nn.Parameter(torch.ones(1000))
    value = {"slice": buffer[10:20], "tied": tied, "tied again": tied.detach(), "turned": torch.ones(2, 3).cumsum(1).T,
             "empty": torch.empty(0), "reshaped": tied.detach().view(10, 100), "list": [buffer[10:20], {"deep": 1}]}
    take = _Taker(to_host)
    taken = take(value)
    assert take.nbytes == 4 * (10 + 1000 + 6)
    path = folder / "x.pt"
    TorchFile("x.pt", taken, 0).write(path, lambda: None, 2)
    assert path.stat().st_size < 10_000
    found = torch.load(path, weights_only=True)
    for name in ("slice", "tied", "turned", "empty", "reshaped"):
        assert torch.equal(found[name], value[name])
    assert not found["tied"].requires_grad
    assert found["tied"].data_ptr() == found["tied again"].data_ptr() == found["reshaped"].data_ptr()
    assert torch.equal(found["list"][0], buffer[10:20])


def test_what_goes_wrong_in_a_flush_on_the_way_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells of it once, to whoever flushes next."""
    real, told = os.fsync, []

    def once(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr("pretrain.engine.writing.os.fsync", once)
    monkeypatch.setattr("pretrain.engine.writing._FLUSHED", LIMIT)
    writing = Writing(folder, [TorchFile("deepspeed/big.pt", {"x": torch.zeros(LIMIT)}, 4 * LIMIT)], beside=True)
    assert writing.wait(60)
    assert told
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        writing.hashes()


def test_what_is_taken_to_the_host_shares_nothing_with_training() -> None:
    class Scaler:
        scale = 1.0

    value = {"weights": torch.zeros(3), "scaler": Scaler(), "steps": [1, {"a": 2}]}
    taken = _Taker(True)(value)
    value["weights"] += 1
    value["scaler"].scale = 2.0
    value["steps"][1]["a"] = 3
    assert torch.equal(taken["weights"], torch.zeros(3))
    assert taken["scaler"].scale == 1.0
    assert taken["steps"] == [1, {"a": 2}]


def test_both_ways_of_taking_lead_to_the_same_bytes(folder: Path) -> None:
    buffer = torch.randn(1000)
    value = {"a": buffer[:10], "b": torch.randn(20), "c": {"d": buffer, "e": buffer.view(10, 100)}, "f": ["x", 1]}
    hashes = {TorchFile("x", _Taker(to_host)(value), 0).write(folder / str(to_host), lambda: None, 2)
              for to_host in (False, True)}
    assert len(hashes) == 1


def test_a_batch_that_cannot_be_kept_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither where its folder cannot be made nor where the library for tensors fails with an error of its own."""
    (tmp_path / "file").touch()
    (tmp_path / "batch-3-rank-0.safetensors").mkdir()
    loaded: Any = SimpleNamespace(k=3, micro_batches=[])
    with caplog.at_level(logging.WARNING, "pretrain"):
        for folder in (tmp_path / "file" / "nonfinite", tmp_path):
            Examiner(folder)._write(loaded, {"rank": 0}, {"cpu": torch.zeros(1)})
    assert caplog.text.count("could not be written") == 2
