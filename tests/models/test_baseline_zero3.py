"""Under ZeRO-3 every weight is read inside its own module, chunks of the loss included, and fresh weights are right."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def probed():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("zero3_probe.py"))], capture_output=True,
                          text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **world})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("body", ["llama", "gpt2"])
def test_partitioned_training_equals_unpartitioned(probed, body):
    for name in ("stage3", "stage3 chunks", "stage3 chunks checkpointing"):
        assert probed[body][name] == pytest.approx(probed[body]["reference"], rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("body", ["llama", "gpt2"])
def test_weights_partitioned_as_they_are_built_are_initialised(probed, body):
    found = probed[body]["spread"]
    assert found["partitioned"]
    for name, std in found["std"].items():
        wanted = 0.01 if body == "gpt2" and "c_proj" in name else 0.02
        assert std == pytest.approx(wanted, rel=0.1), name
    assert found["groups"] == {"llama": {"decay": 14, "no_decay": 6}, "gpt2": {"decay": 8, "no_decay": 20}}[body]
