"""CPU offload trains as without. Slow: DeepSpeed compiles its CPU optimizer first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.world import ROOT, case, launch_cases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
_COMPILE = ("import deepspeed.ops.op_builder as b\n"
            "b.CPUAdamBuilder().load(verbose=False)\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled once, in one process, in a cache that this CPU and torch own; then one launch of two ranks."""
    import torch
    key = f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}".replace(" ", "")
    cache = Path(ROOT) / ".cache" / "torch_extensions" / key
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache)
    for lock in cache.glob("**/lock"):
        lock.unlink()
    environment = dict(os.environ, DS_ACCELERATOR="cpu", MAX_JOBS="2")
    built = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, timeout=900, capture_output=True,
                           text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return launch_cases("tests.engine.offload_cases", 2, tmp_path_factory.mktemp("offload"))


@pytest.mark.parametrize("way", ["2-optimizer", "3-optimizer", "3-both"])
def test_offload_changes_no_loss_beyond_rounding(found: dict[str, Any], way: str) -> None:
    # DeepSpeed's vectorised AdamW rounds otherwise than torch's; over 20 steps that stays below 1e-5.
    assert found["losses"][way] == pytest.approx(found["losses"][way[0]], rel=1e-5)


def test_a_run_goes_on_with_and_without_offload(found: dict[str, Any]) -> None:
    assert case(found, "in_turn") == pytest.approx(found["losses"]["2"], rel=1e-5)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_offload_files_train_with_plain_deepspeed(found: dict[str, Any], stage: str) -> None:
    losses = found["plain_json"][stage]
    assert losses[-1] < losses[0]
