"""Compares checkpoints by parameter name, whatever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pretrain.engine.shards import MOMENTS, Shards, open_shards
from pretrain.runfolder.publish import Manifest

LOSS_RTOL = {"fp32": 1e-5, "bf16": 3e-5}
"""In bf16 gradients of micro-batches add up in fp32, mostly without rounding: with equal micro-batches losses differ by
nothing (measured), with others by 9e-6. A leaked decay or a wrong step count moves them by 5e-5 and more within 10
steps."""
STATE_RTOL = {"fp32": 1e-4, "bf16": 2**-8}
"""Relative to a tensor's largest element. AdamW divides by the root of the second moment, so that elements whose
gradients are almost 0 carry much of the rounding into the weights."""


def shards_of(checkpoint: Path) -> Shards:
    """The reader of a checkpoint that is whole."""
    manifest = Manifest.read(checkpoint)
    assert manifest.verify(checkpoint) == []
    return open_shards(checkpoint, manifest)


def states(checkpoint: Path) -> tuple[int | None, dict[str, torch.Tensor]]:
    """Step count, and masters and moments by "name/kind"."""
    shards = shards_of(checkpoint)
    return shards.step, {f"{name}/{kind}": shards.whole(name, kind) for name in shards.places
                         for kind in ("master", *MOMENTS)}


def assert_same_state(before: Path, after: Path) -> None:
    """Equal bits of masters, moments, frozen parameters, buffers and hooks; equal step, cursor and schedule."""
    step, mine = states(after)
    want_step, want = states(before)
    assert step == want_step
    assert mine.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(mine[key], value), key
    rest, want_rest = load_file(after / "extra.safetensors"), load_file(before / "extra.safetensors")
    assert rest.keys() == want_rest.keys()
    for key, value in want_rest.items():
        assert rest[key].dtype == value.dtype and torch.equal(rest[key], value), key
    assert _state(after) == _state(before)


def _state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` but the number of saves, which the second save may have raised."""
    stored: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    del stored["state"]["saves"], stored["state"]["counted"]
    return stored


def assert_close_state(want_at: Path, have_at: Path, precision: str) -> None:
    """Masters and moments near each other, element by element."""
    step, have = states(have_at)
    want_step, want = states(want_at)
    assert step == want_step
    assert have.keys() == want.keys()
    for key, value in want.items():
        difference, scale = float((have[key] - value).abs().max()), float(value.abs().max())
        assert difference <= STATE_RTOL[precision] * scale, f"{key}: off by {difference:.3g}, largest {scale:.3g}"
