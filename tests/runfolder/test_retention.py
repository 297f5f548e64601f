from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.retention import delete, live_pins, pinned, remove_dead_pins, to_delete

refs = st.lists(st.integers(1, 60), unique=True, max_size=12).map(
    lambda steps: [CheckpointRef(Path(f"step-{step}.f1"), step, 1) for step in steps])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), refs, st.integers(1, 4), st.sampled_from([None, 1, 5, 20]))
def test_exactly_the_rule_is_kept(data, checkpoints, keep_last, multiples):
    some = st.lists(st.sampled_from(checkpoints), unique=True, max_size=3) if checkpoints else st.just([])
    best, pins = data.draw(some), data.draw(some)
    latest = data.draw(st.sampled_from(checkpoints)) if checkpoints else None
    gone = to_delete(checkpoints, keep_last=keep_last, best_steps=[ref.step for ref in best],
                     keep_multiples_of=multiples, pinned=pins, latest=latest)
    for ref in checkpoints:
        newer = sum(other.step > ref.step for other in checkpoints)
        kept = (newer < keep_last or ref in best or ref in pins or ref == latest
                or (multiples is not None and ref.step % multiples == 0))
        assert (ref in gone) != kept
    assert [ref.step for ref in gone] == sorted(ref.step for ref in gone)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path)


def make(folder: RunFolder, step: int = 1) -> CheckpointRef:
    ref = folder.final_checkpoint(step, 1)
    ref.path.mkdir()
    (ref.path / "manifest.json").write_text("{}")
    return ref


def test_what_is_read_is_not_deleted(folder):
    ref = make(folder)
    with pinned(ref), pinned(ref):
        assert len(live_pins(ref)) == 2
        assert not delete(ref)
    assert folder.checkpoints() == [ref]
    with pinned(ref):  # the refused deletion left no mark behind
        pass
    assert delete(ref)
    assert list(folder.checkpoints_dir.iterdir()) == []
    with pytest.raises(FileNotFoundError), pinned(ref):
        pass


def test_the_pin_of_a_dead_reader_does_not_count(folder):
    ref = make(folder)
    child = os.fork()
    if child == 0:
        reader = pinned(ref)
        reader.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((ref.path / ".readers").iterdir())) == 1
    assert live_pins(ref) == []
    assert delete(ref)


def test_pins_of_dead_readers_are_removed_and_those_of_the_living_stay(folder):
    ref = make(folder)
    child = os.fork()
    if child == 0:
        pinned(ref).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    with pinned(ref):
        remove_dead_pins(folder)
        assert list((ref.path / ".readers").iterdir()) == live_pins(ref) != []


def test_pins_of_other_machines_hold_for_a_day(folder):
    ref = make(folder)
    with pinned(ref):
        pin = live_pins(ref)[0]
        text = pin.read_text().replace(os.uname().nodename, "elsewhere")
    pin.write_text(text)
    assert not delete(ref)
    os.utime(pin, (0, 0))
    assert delete(ref)


def _text(ref: CheckpointRef) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return (ref.path / "manifest.json").read_text()
    return None


def test_no_reader_starts_on_a_condemned_checkpoint(folder):
    ref = make(folder)
    (ref.path / ".readers").mkdir()
    (ref.path / ".readers" / ".condemned").touch()
    with pytest.raises(FileNotFoundError, match="is being removed"), pinned(ref):
        pass
    assert live_pins(ref) == []


def test_a_reader_and_a_deleter_at_once(folder):
    """Whoever gets the pin reads everything; whoever does not is told so before reading."""
    outcomes = set()
    for step in range(200):
        ref = make(folder, step)
        barrier = threading.Barrier(2)
        deleted: list[bool] = []

        def remove(ref=ref, barrier=barrier, deleted=deleted) -> None:
            barrier.wait()
            deleted.append(delete(ref))

        thread = threading.Thread(target=remove)
        thread.start()
        barrier.wait()
        try:
            with pinned(ref):
                texts = [_text(ref) for _ in range(20)]
            assert texts == ["{}"] * 20
            outcomes.add("read")
        except FileNotFoundError:
            outcomes.add("refused")
        thread.join()
        outcomes.add("deleted" if deleted[0] else "kept")
        assert ref.path.exists() != deleted[0]
    assert len(outcomes) >= 2
