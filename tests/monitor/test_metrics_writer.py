from __future__ import annotations

import csv
import json
import math
import os
import resource
import signal
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.monitor.rows import decode, encode, last_row
from pretrain.monitor.writers import MetricsWriter, WandbOptions, read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import Lease

keys = st.sampled_from(["loss", "lr", "val/loss", "note", "a,b", 'quo"te', "loss_ema"])
values = st.one_of(st.none(), st.integers(-10**9, 10**9), st.floats(), st.text(max_size=5))
rows = st.dictionaries(keys, values, max_size=4)


def same(left, right) -> bool:
    """Equality that calls NaN equal to itself."""
    return json.dumps(left) == json.dumps(right)


def started(tmp_path, resumed_from: tuple[int, int] | None = None) -> tuple[RunFolder, int]:
    folder = RunFolder.create(tmp_path / "run")
    lease = Lease.acquire(folder)
    if resumed_from is None:
        lease.set_fresh()
    else:
        lease.set_resumed_from(*resumed_from, "")
    lease.release()
    return folder, lease.fence


def write(folder: RunFolder, fence: int, *written: dict, columns=("step",)) -> None:
    writer = MetricsWriter(folder, columns, False, None, fence)
    for row in written:
        writer.write(row)
    writer.close()


def table(folder: RunFolder) -> list[dict[str, str]]:
    with open(folder.metrics_csv, newline="") as file:
        return list(csv.DictReader(file, strict=True))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows, st.integers(1, 99))
def test_a_row_comes_back_as_it_was_written(row, fence):
    line = encode(row, fence)
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert same(decode(line), {"fence": fence, **row})


def test_non_finite_values_leave_a_note():
    assert json.loads(encode({"a": math.nan, "b": -math.inf}, 1)) == \
        {"fence": 1, "a": None, "a_nonfinite": "nan", "b": None, "b_nonfinite": "-inf"}


def test_a_line_torn_anywhere_harms_no_other(tmp_path):
    folder, fence = started(tmp_path)
    first, second = {"step": 1, "loss": 2.5, "note": "é"}, {"step": 2, "loss": math.inf}
    write(folder, fence, first, second)
    whole = folder.metrics_jsonl.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        folder.metrics_jsonl.write_bytes(whole[:cut])
        assert same(read_metrics(folder)[0], {"fence": fence, **first})
        write(folder, fence, {"step": 3})
        kept = [row["step"] for row in read_metrics(folder)]
        assert kept in ([1, 3], [1, 2, 3])
        assert (kept == [1, 2, 3]) == (cut >= len(whole) - 1)


def test_rows_are_there_as_soon_as_they_are_written(tmp_path):
    folder, fence = started(tmp_path)
    writer = MetricsWriter(folder, ("step",), False, None, fence)
    for step in range(5):
        writer.write({"step": step})
        assert len(read_metrics(folder)) == len(table(folder)) == step + 1


def test_rows_past_the_point_of_resumption_are_superseded(tmp_path):
    folder, first = started(tmp_path)
    write(folder, first, *({"step": step, "loss": 1.0} for step in range(1, 9)))
    folder, second = started(tmp_path, (5, first))
    write(folder, second, {"step": 6, "loss": 2.0})
    write(folder, first, {"step": 9, "loss": 9.0})  # a stale process still at it
    folder, third = started(tmp_path, (6, second))
    write(folder, third, {"step": 7, "loss": 3.0})
    got = [(row["step"], row["loss"]) for row in read_metrics(folder)]
    assert got == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 2.0), (7, 3.0)]
    assert [(int(row["step"]), float(row["loss"])) for row in table(folder)] == got
    assert last_row(folder, "loss") == read_metrics(folder)[-1]


def test_last_row_finds_the_newest_with_the_key_in_a_long_file(tmp_path):
    folder, fence = started(tmp_path)
    assert last_row(folder, "loss") is None
    pad = "x" * 200
    folder.metrics_jsonl.write_bytes(b"".join(encode({"step": i, "loss": float(i), "pad": pad}, fence)
                                              for i in range(1000)) + encode({"step": 1000, "val": 1.0}, fence))
    assert last_row(folder, "loss") == read_metrics(folder)[999]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(rows, min_size=1, max_size=8))
def test_the_table_equals_the_record(tmp_path_factory, written):
    """Whatever columns appear when: one header, rows of its length, each value under its name, empty where none."""
    folder, fence = started(tmp_path_factory.mktemp("run"))
    written = [{"step": i, **row} for i, row in enumerate(written)]
    write(folder, fence, *written, columns=("lr", "step"))
    with open(folder.metrics_csv, newline="") as file:
        header = next(csv.reader(file))
    appeared = dict.fromkeys(key for row in written for key in row)
    assert header == ["lr", "step", *(key for key in appeared if key not in ("lr", "step"))]
    for cells, row in zip(table(folder), written, strict=True):
        assert None not in cells
        assert None not in cells.values()
        assert cells == {key: "" if row.get(key) is None else str(row[key]) for key in header}


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path):
    """The limit on file size is our full disk. Room that comes back is used again, a torn row is passed over."""
    folder, fence = started(tmp_path)
    writer = MetricsWriter(folder, ("step",), False, None, fence)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        writer.write({"step": 0, "text": "x" * 50})
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, old[1]))
        for step in range(1, 4):
            writer.write({"step": step, "text": "x" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    writer.write({"step": 4, "text": "y"})
    writer.sync()
    writer.close()
    steps = [row["step"] for row in read_metrics(folder)]
    assert steps[0] == 0
    assert steps[-1] == 4
    assert len(steps) < 5


def test_tables_lose_no_row_of_the_record_to_a_disk_that_was_full_for_a_while(tmp_path):
    """Neither by an appended row, nor by a new column, nor at the end; each is a row that could not be written."""
    folder, fence = started(tmp_path)
    writer = MetricsWriter(folder, ("step",), False, None, fence)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.write({"step": 0, "text": "x"})
    record = writer._jsonl

    def on_full_disk(row) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, old[1]))
        for table in writer._tables:
            table.write(row)
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        record.write(encode(row, fence))

    try:
        on_full_disk({"step": 1, "text": "y"})
        on_full_disk({"step": 2, "text": "z", "new": 1.0})
        writer.write({"step": 3, "text": "a"})
        assert [row["step"] for row in csv.DictReader(folder.metrics_csv.open())] == ["0", "1", "2", "3"]
        on_full_disk({"step": 4})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, old[1]))
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_an_unwritable_place_is_a_user_error(tmp_path):
    folder, fence = started(tmp_path)
    folder.metrics_jsonl.mkdir()
    with pytest.raises(UserError, match=r"metrics cannot be written.*metrics\.jsonl"):
        MetricsWriter(folder, (), False, None, fence)


def test_tensorboard_shows_the_scalars_that_count(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, first = started(tmp_path)
    writer = MetricsWriter(folder, (), True, None, first)
    for step in range(1, 9):
        writer.write({"step": step, "loss": 1.0, "text": "no scalar", "none": None})
    writer.close()
    folder, second = started(tmp_path, (5, first))
    writer = MetricsWriter(folder, (), True, None, second)
    writer.write({"step": 6, "loss": 2.0})
    writer.close()
    events = EventAccumulator(str(folder.tensorboard_dir))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == \
        [*((step, 1.0) for step in range(1, 6)), (6, 2.0)]


OPTIONS: WandbOptions = {"project": "p", "name": "n", "config": {"a": 1}}


def test_wandb_must_be_installed_if_asked_for(tmp_path, monkeypatch):
    folder, fence = started(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pretrain\[wandb\]"):
        MetricsWriter(folder, (), False, OPTIONS, fence)


def test_wandb_keeps_its_run_over_restarts_and_never_stops_ours(tmp_path, monkeypatch, caplog):
    folder, fence = started(tmp_path)
    calls: list = []

    class Run:
        def log(self, data, step):
            calls.append((data, step))
            if step == 2:
                raise ConnectionError("unreachable")

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    ids = iter(["first", "second"])
    fake = types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: next(ids)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = MetricsWriter(folder, (), False, OPTIONS, fence)
        writer.write({"step": 1, "loss": 3.0})
        writer.close()
    assert [call["id"] for call in calls if isinstance(call, dict)] == ["first", "first"]
    assert calls[1:3] == [({"loss": 3.0}, 1), "finish"]
    writer = MetricsWriter(folder, (), False, OPTIONS, fence)
    for step in (2, 3):
        writer.write({"step": step, "loss": 3.0})
    writer.close()
    assert "unreachable" in caplog.text
    assert [row["step"] for row in read_metrics(folder)] == [1, 1, 2, 3]
    monkeypatch.setattr(fake, "init", lambda **options: os.stat("/nonexistent"))
    MetricsWriter(folder, (), False, OPTIONS, fence).close()
    assert "cannot start" in caplog.text


def test_declared_columns_may_have_other_names_and_bring_the_long_table(tmp_path):
    folder, fence = started(tmp_path)
    columns = ("step", "train_loss=loss", "val_loss=val/loss", "empty")
    write(folder, fence, {"step": 10, "loss": 2.5, "lr": 0.1, "text": None}, {"step": 20, "val/loss": 3.0},
          columns=columns)
    assert folder.metrics_csv.read_text() == ("step,train_loss,val_loss,empty,lr,text\n10,2.5,,,0.1,\n20,,3.0,,,\n")
    long = "step,name,value\n10,train_loss,2.5\n10,lr,0.1\n20,val_loss,3.0\n"
    assert folder.metrics_long_csv.read_text() == long
    write(folder, fence, {"step": 30, "loss": 1.0}, columns=columns)
    assert folder.metrics_long_csv.read_text() == long + "30,train_loss,1.0\n"
    other, fence = started(tmp_path / "plain")
    write(other, fence, {"step": 1}, columns=())
    assert not other.metrics_long_csv.exists()
