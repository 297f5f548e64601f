"""The reader of shards against files laid out by hand, as DeepSpeed's layout is described, and its memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.engine.shards import MOMENTS, PRIVATE, TAG, Kind, Shards, open_shards
from pretrain.errors import DataCorruption
from pretrain.runfolder.publish import Manifest

KINDS: tuple[Kind, ...] = ("master", *MOMENTS)
Values = dict[str, dict[str, torch.Tensor]]
"""By name, then by kind."""


def write(folder: Path, stage: int, world: int, groups: list[list[str]], values: Values, step: int = 7) -> Manifest:
    """Lay `values` out as `world` ranks at `stage` would."""
    (folder / TAG).mkdir(parents=True, exist_ok=True)
    manifest = Manifest(step, step, 1, world, stage, "fp32", {})
    header: dict[str, Any] = {"global_steps": step, PRIVATE: {"optimizer_parameters": groups},
                              "param_shapes": [{n: values[n]["master"].shape for n in group} for group in groups]}
    if stage == 0:
        names = [name for group in groups for name in group]
        states = {index: {"step": torch.tensor(float(step)), **{moment: values[name][moment] for moment in MOMENTS}}
                  for index, name in enumerate(names)}
        header |= {"module": {name: values[name]["master"] for name in names}, "optimizer": {"state": states}}
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save(header, folder / TAG / name)
    for rank in range(world if stage else 0):
        raw = (_sub_groups if stage == 3 else _flat_groups)(rank, world, groups, values, step)
        torch.save({"optimizer_state_dict": raw}, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return manifest


def _flat_groups(rank: int, world: int, groups: list[list[str]], values: Values, step: int) -> dict[str, Any]:
    masters, states, paddings, notes = [], {}, [], []
    for index, group in enumerate(groups):
        lead, starts = 0, {}
        for name in group:
            starts[name] = lead
            lead += values[name]["master"].numel()
        total = -(-lead // (2 * world)) * 2 * world
        size = total // world
        own = {kind: torch.cat([values[name][kind].flatten() for name in group] + [torch.full((total - lead,), -1.0)])
               [rank * size:(rank + 1) * size].clone() for kind in KINDS}
        paddings.append(min(size, max(0, (rank + 1) * size - lead)))
        masters.append(own["master"][:size - paddings[-1]])
        states[index] = {"step": torch.tensor(float(step)), **{moment: own[moment] for moment in MOMENTS}}
        ends = {name: start + values[name]["master"].numel() for name, start in starts.items()}
        spans = {name: (max(starts[name], rank * size), min(ends[name], (rank + 1) * size)) for name in group}
        notes.append({name: SimpleNamespace(start=low - rank * size, numel=high - low)
                      for name, (low, high) in spans.items() if low < high})
    return {"single_partition_of_fp32_groups": masters, "base_optimizer_state": {"state": states},
            "group_paddings": paddings, "param_alignment_paddings": [[0] * len(group) for group in groups],
            "param_slice_mappings": notes}


def _sub_groups(rank: int, world: int, groups: list[list[str]], values: Values, step: int) -> dict[str, Any]:
    def share(tensor: torch.Tensor) -> torch.Tensor:
        size = -(-tensor.numel() // world)
        padded = torch.cat([tensor.flatten(), torch.full((size * world - tensor.numel(),), -1.0)])
        return padded[rank * size:(rank + 1) * size]

    flat = {kind: [torch.cat([share(values[name][kind]) for name in group]) for group in groups] for kind in KINDS}
    states = {i: {"step": torch.tensor(float(step)), **{m: flat[m][i] for m in MOMENTS}} for i in range(len(groups))}
    return {"fp32_flat_groups": flat["master"], "optimizer_state_dict": {"state": states}}


def make(shapes: list[tuple[int, ...]]) -> Values:
    """Every element of every tensor is another number."""
    values: Values = {}
    count = 0
    for index, shape in enumerate(shapes):
        values[f"p{index}"] = {}
        for kind in KINDS:
            tensor = torch.arange(count, count + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
            count += tensor.numel()
            values[f"p{index}"][kind] = tensor
    return values


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_every_range_of_every_parameter_is_found_in_every_layout(tmp_path_factory: Any, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.sampled_from([(1,), (2,), (3, 5), (7,), (4, 4), (2, 3, 5)]), min_size=1, max_size=5))
    cut = data.draw(st.integers(0, len(shapes) - 1))
    names = [f"p{i}" for i in range(len(shapes))]
    groups = [group for group in (names[:cut], names[cut:]) if group]
    stage, world = data.draw(st.sampled_from([0, 1, 2, 3])), data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    values = make(shapes)
    folder = tmp_path_factory.mktemp("shards")
    shards = open_shards(folder, write(folder, stage, world, groups, values))
    assert shards.step == 7
    assert set(shards.places) == set(names)
    for name in names:
        for kind in KINDS:
            want = values[name][kind]
            assert torch.equal(shards.whole(name, kind), want)
            start = data.draw(st.integers(0, want.numel() - 1))
            out = torch.empty(data.draw(st.integers(1, want.numel() - start)))
            shards.copy(name, kind, start, out)
            assert torch.equal(out, want.flatten()[start:start + len(out)])


def test_shares_of_another_world_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 3, 2, [["p0", "p1"]], make([(5,), (6,)]))
    with pytest.raises(DataCorruption, match="rank 0 has sub-groups"):
        open_shards(tmp_path, Manifest(7, 7, 1, 3, 3, "fp32", {})).whole("p1")


def test_parameters_that_lie_elsewhere_than_noted_are_refused(tmp_path: Path) -> None:
    groups, values = [["p0", "p1"]], make([(5,), (6,)])
    manifest = write(tmp_path, 1, 2, groups, values)
    raw = _flat_groups(0, 2, groups, values, 7)
    raw["param_slice_mappings"][0]["p1"].start += 1
    torch.save({"optimizer_state_dict": raw}, tmp_path / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(DataCorruption, match="rank 0 keeps its parameters"):
        open_shards(tmp_path, manifest).whole("p1")


def test_ranks_that_count_other_updates_are_refused(tmp_path: Path) -> None:
    values = make([(5,), (6,)])
    manifest = write(tmp_path, 3, 2, [["p0", "p1"]], values)
    later = _sub_groups(1, 2, [["p0", "p1"]], values, step=8)
    torch.save({"optimizer_state_dict": later}, tmp_path / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(DataCorruption, match="rank 1 counts"):
        open_shards(tmp_path, manifest).whole("p1")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path, 2, 2, [["p0"]], make([(9,)]))
    (tmp_path / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DataCorruption, match="zero_pp_rank_1"):
        open_shards(tmp_path, manifest).whole("p0")


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@contextmanager
def peak_of_private_bytes() -> Iterator[list[int]]:
    """The largest value seen inside, sampled all the time, as the one element of the list."""
    peak, done = [private_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 3), (3, 3)])
def test_a_rank_holds_no_second_copy_of_what_it_reads(tmp_path: Path, stage: int, world: int) -> None:
    """96 MB of state in three parameters; rank 0 of 2 takes its half into tensors that are there already."""
    shapes = [(2000, 2000), (1, 2_999_999), (1_000_003,)]
    manifest = write(tmp_path, stage, world, [["p0"], ["p1", "p2"]], make(shapes))
    halves = {f"p{i}": (torch.Size(shape).numel() + 1) // 2 for i, shape in enumerate(shapes)}
    out = {(name, kind): torch.ones(half) for name, half in halves.items() for kind in KINDS}
    warm: Shards = open_shards(tmp_path, manifest)
    warm.copy("p0", "master", 0, torch.empty(1))
    ctypes.CDLL(None).malloc_trim(0)  # else what the files were made of is handed out again and hides a copy
    before = private_bytes()
    with peak_of_private_bytes() as peak:
        shards = open_shards(tmp_path, manifest)
        for (name, kind), target in out.items():
            shards.copy(name, kind, 0, target)
    assert sum(t.numel() * 4 for t in out.values()) > 45e6
    assert peak[0] - before < 4e6
