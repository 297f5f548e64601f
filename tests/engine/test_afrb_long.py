"""2048 tokens on a frozen backbone under ZeRO-2 and ZeRO-3: what was killed goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.consolidate import load_weights
from tests.engine import elastic_checks
from tests.engine.afrb_long_cases import SAVED, STEPS, WAYS
from tests.engine.world import case, launch_cases

pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(900)]
MODULE = "tests.engine.afrb_long_cases"
KEYS = [f"{stage}-{precision}" for stage, precision in WAYS]
FROZEN = "backbone."
GATES = ("gamma.change", "kappa.change", "pvm.gate.conv", "pvm.gate.weight")
"""Ends of names: gate of the phase branch, gate of the memory, write gate."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long")


@pytest.fixture(scope="module")
def first(base: Path) -> dict[str, Any]:
    """Two ranks train undisturbed, train again, save, and are killed."""
    return launch_cases(MODULE, 2, base / "first")


@pytest.fixture(scope="module")
def second(base: Path, first: dict[str, Any]) -> dict[str, Any]:
    """Two new ranks go on with what was killed."""
    before = {key: load_weights(checkpoint(base, "killed", key, f"step-{SAVED}.f1")) for key in KEYS}
    return {**launch_cases(MODULE, 2, base / "second"), "before": before}


def checkpoint(base: Path, launch: str, key: str, name: str) -> Path:
    return base / "first" / launch / "runs" / key / "checkpoints" / name


@pytest.mark.parametrize("key", KEYS)
def test_losses_are_those_of_the_undisturbed_run_bit_for_bit(
        key: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    found = case(second, "gone_on")[key]
    assert found["begun"] == SAVED and "killed" not in first
    assert found["losses"] == case(first, "undisturbed")[key] and len(found["losses"]) == STEPS
    assert len(set(found["losses"])) == STEPS


@pytest.mark.parametrize("key", KEYS)
def test_all_that_is_saved_is_that_of_the_undisturbed_run_bit_for_bit(
        key: str, base: Path, second: dict[str, Any]) -> None:
    """Masters, moments, frozen weights, buffers, cursor; and the saved half was no copy of the end."""
    ends = [checkpoint(base, "undisturbed", key, f"step-{STEPS}.f1"), checkpoint(base, "killed", key,
                                                                                 f"step-{STEPS}.f2")]
    elastic_checks.assert_same_state(*ends)
    whole, mine = (load_weights(path) for path in ends)
    assert whole.keys() == mine.keys() and all(torch.equal(whole[name], mine[name]) for name in whole)
    before = second["before"][key]
    moved = {name for name in mine if not torch.equal(before[name], mine[name])}
    assert not any(name.startswith(FROZEN) for name in moved)
    for gate in GATES:
        assert any(name.endswith(gate) for name in moved), (gate, sorted(moved))


@pytest.mark.parametrize("key", KEYS)
def test_the_frozen_backbone_is_that_of_the_first_start(key: str, base: Path, second: dict[str, Any]) -> None:
    """The folder it came from holds other weights by now: they are the checkpoint's, not read again or drawn."""
    now = load_file(base / "backbone" / "model.safetensors")
    mine = load_weights(checkpoint(base, "killed", key, f"step-{STEPS}.f2"))
    frozen = [name for name in now if f"backbone.native.{name}" in mine and now[name].ndim == 2]
    assert len(frozen) == 8 and not any("self_attn" in name for name in frozen)
    for name in frozen:
        assert torch.equal(mine[f"backbone.native.{name}"], second["before"][key][f"backbone.native.{name}"])
        assert not torch.equal(mine[f"backbone.native.{name}"].float(), now[name])
