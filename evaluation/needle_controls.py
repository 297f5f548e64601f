"""Controls of the needle task (AFRB spec, section 19): the same question where the answer should be out of reach.

A control changes the example (and never the target), or switches a part of the model off. Each says what a model
without a leak is expected to do, so that a reader can tell a failed control from a failed model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from evaluation.needle_reader import READOUT_OFF, Reader
from pretrain.config.needle import KEY_LEN, NeedleConfig
from pretrain.data.bijection import as_keys, derive, stream_key
from pretrain.data.needle import NeedleRows, NeedleSource
from pretrain.metrics.needle import Predictions

Change = Callable[[NeedleRows, NeedleConfig, np.ndarray], np.ndarray]
"""(examples, task, their ids [N]) -> tokens [N, C + 6 + L]."""
Expected = Literal["uniform", "context_bag", "needle_bag", "reported"]


@dataclass(frozen=True, slots=True)
class Control:
    """One line of the table."""

    name: str
    meaning: str
    expected: Expected
    """The null at which a model without a leak stays. uniform: nothing is left to find. context_bag: the context is
    left, to be copied from anywhere. needle_bag: the needle's tokens, not their order. reported: no bound follows."""
    change: Change | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    """Passed to the model's forward."""


ITSELF = Control("itself", "nothing is changed", "reported")


def shuffled_needle(rows: NeedleRows, task: NeedleConfig, ids: np.ndarray) -> np.ndarray:
    """Other ids in the needle's place."""
    return _in_place_of_needle(rows, rows.spare[:, :task.needle_len])


def permuted_needle(rows: NeedleRows, task: NeedleConfig, ids: np.ndarray) -> np.ndarray:
    """The needle's tokens in another order."""
    hashes = derive(derive(as_keys(stream_key("needle/permuted")), ids.astype(np.uint64))[:, None],
                    np.arange(task.needle_len, dtype=np.uint64))
    return _in_place_of_needle(rows, np.take_along_axis(rows.needle, np.argsort(hashes, axis=1), axis=1))


def query_removed(rows: NeedleRows, task: NeedleConfig, ids: np.ndarray) -> np.ndarray:
    """The fixed query where it holds a key; random ids where it is fixed."""
    query = np.array(task.query_ids) if task.has_key else rows.spare[:, :len(task.query_ids)]
    return _in_place_of_query(rows, task, 0, query)


def wrong_key(rows: NeedleRows, task: NeedleConfig, ids: np.ndarray) -> np.ndarray:
    """A key that stands nowhere in the context."""
    return _in_place_of_query(rows, task, len(task.query_ids) - KEY_LEN, rows.spare[:, -KEY_LEN:])


def _in_place_of_needle(rows: NeedleRows, tokens: np.ndarray) -> np.ndarray:
    changed = rows.tokens.copy()
    places = rows.start[:, None] + np.arange(tokens.shape[1])
    np.put_along_axis(changed, places, tokens, axis=1)
    return changed


def _in_place_of_query(rows: NeedleRows, task: NeedleConfig, first: int, tokens: np.ndarray) -> np.ndarray:
    changed = rows.tokens.copy()
    changed[:, task.context_len + first:task.retrieval_start] = tokens
    return changed


SWITCHES: dict[str, tuple[str, Expected]] = {
    "memory_zero": ("the memory is read as if it were empty", "uniform"),
    READOUT_OFF: ("nothing is read out of the memory", "reported"),
    "phase_freeze": ("the read head does not turn: always the first slot", "needle_bag"),
}
"""Controls that a model may know, by the name of the control of its forward: (meaning, what is expected)."""


def applicable(task: NeedleConfig, switches: Collection[str]) -> list[Control]:
    """The controls that mean something on this task, and of `SWITCHES` those that the model knows.

    With one tagged needle the tag alone says what is wanted, and so does a fixed query: no bound follows then from a
    query that is missing or wrong.
    """
    asks: Expected = "context_bag" if task.needle_marker == "key" or (task.has_key and task.needles > 1) else "reported"
    found = [
        Control("shuffled_needle", "other ids stand in the needle's place, the target is the old one", "uniform",
                shuffled_needle),
        Control("permuted_needle", "the needle stands there in another order", "needle_bag", permuted_needle),
        Control("query_removed", "the query names no key" if task.has_key else "random ids stand in the query's place",
                asks if task.has_key else "reported", query_removed)]
    if task.has_key:
        found.append(Control("wrong_key", "the query names a key that stands nowhere", asks, wrong_key))
    found += [Control(name, meaning, expected, controls={name: 1.0})
              for name, (meaning, expected) in SWITCHES.items() if name in switches]
    return found


def run_control(reader: Reader, source: NeedleSource, ids: np.ndarray, control: Control,
                batch_size: int) -> Predictions:
    """Free-running answers under a control, against the unchanged target."""
    task = source.config
    asked = Reader(reader.forward, reader.device, reader.readout, {**reader.controls, **control.controls})
    needle, free = [], []
    for part in parts(ids, batch_size):
        rows = source.rows(part)
        tokens = rows.tokens if control.change is None else control.change(rows, task, part)
        prefix = torch.from_numpy(tokens[:, :task.retrieval_start].copy())
        free.append(asked.free(prefix, task.needle_len, task.vocab_size).numpy())
        needle.append(rows.needle)
    return Predictions(np.concatenate(needle), np.concatenate(free))


def parts(ids: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """`ids` in batches."""
    for at in range(0, len(ids), batch_size):
        yield ids[at:at + batch_size]


@dataclass(frozen=True, slots=True)
class Check:
    """A property that holds or not."""

    name: str
    passed: bool
    message: str


def future_check(reader: Reader, source: NeedleSource, ids: np.ndarray) -> Check:
    """Logits before a place are bit for bit the same whatever stands after it."""
    tokens, positions = _probe(source, ids)
    middle = tokens.shape[1] // 2
    earlier = positions[:, :1] * 0 + torch.arange(middle - 8, middle)
    changed = tokens.clone()
    changed[:, middle:] = tokens[:, middle:].roll(1, dims=1)
    difference = float((reader.at(tokens, earlier) - reader.at(changed, earlier)).abs().max())
    return Check("future_perturbation", difference == 0.0,
                 f"tokens from {middle} on were changed, logits before differ by {difference:.2g}")


def batch_check(reader: Reader, source: NeedleSource, ids: np.ndarray) -> Check:
    """An example alone gives the logits that it gives among others, to rounding."""
    tokens, positions = _probe(source, ids)
    together = reader.at(tokens, positions)
    alone = torch.cat([reader.at(tokens[row:row + 1], positions[row:row + 1]) for row in range(len(tokens))])
    difference = float((together - alone).abs().max() / together.abs().max().clamp_min(1e-9))
    same = bool((together.argmax(-1) == alone.argmax(-1)).all())
    return Check("batch_composition", difference <= 1e-4 and same,
                 f"alone and in a batch of {len(tokens)}: relative difference {difference:.2g}")


def _probe(source: NeedleSource, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    batch = source.get(ids)
    return batch["input_ids"], batch["readout_positions"]
