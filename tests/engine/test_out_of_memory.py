"""Which errors are a lack of memory, and the line about one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config.load import load_run_config
from pretrain.config.presets import preset_path
from pretrain.engine import outofmemory
from pretrain.engine.outofmemory import describe, is_out_of_memory, memory_told
from pretrain.errors import ConfigError, UserError
from pretrain.monitor.clock import TimeShares


def raised(action: Any) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        action()
    return caught.value


def test_what_allocators_here_say_is_known() -> None:
    assert is_out_of_memory(raised(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(raised(lambda: np.empty(1 << 50)))
    assert is_out_of_memory(raised(lambda: bytearray(1 << 60)))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error: ... Failed to CUDA calloc async: out of memory"), RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"), RuntimeError("unable to mmap 4096 bytes: Cannot allocate memory (12)")])
def test_what_others_say_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory"),
                                   OSError(28, "No space left on device"), None])
def test_other_errors_are_left_alone(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


def arguments(*sets: str) -> tuple[Any, Any, Any, Any]:
    config = load_run_config(preset_path("baseline-350m"), [
        "batch={global_batch_size: 64, micro_batch_size: 64, gradient_accumulation_steps: null}",
        "data.seq_len=1024", "engine={zero_stage: 2, activation_checkpointing: false}", *sets]).config
    world = SimpleNamespace(rank=1, device=torch.device("cpu"), peers=())
    return config, config.batch.resolve(1), "fp32", world


def test_the_line_says_where_how_much_and_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outofmemory, "memory_bytes", lambda: 40 << 30)
    line = describe("the forward pass", *arguments())
    assert line.startswith("rank 1 ran out of memory in the forward pass: its share of this machine is 40.00 GiB; the "
                           "estimate expects ")
    assert "with micro-batches of 64 x 1024 tokens, ZeRO stage 2, fp32; set batch.micro_batch_size=" in line
    assert ", or engine.activation_checkpointing=true (" in line


def test_an_estimate_that_would_have_fitted_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outofmemory, "memory_bytes", lambda: 4000 << 30)
    assert ", fp32, which should fit; set batch.micro_batch_size=32 (" in describe("a step", *arguments())


def test_where_nothing_helps_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outofmemory, "memory_bytes", lambda: 1 << 30)
    assert describe("a step", *arguments()).endswith("no setting makes it fit; use a smaller model or data.seq_len")


def test_an_address_space_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outofmemory.resource, "getrlimit", lambda _: (20 << 30, -1))
    monkeypatch.setattr(outofmemory.resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(outofmemory, "memory_bytes", lambda: 400 << 30)
    assert "ulimit -v leaves it " in describe("a step", *arguments())


def test_what_others_hold_of_a_gpu_is_said_and_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 19 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config, batch, precision, world = arguments()
    world.device = torch.device("cuda", 0)
    line = describe("the backward pass", config, batch, precision, world)
    assert "NVIDIA H100 80GB HBM3 has 80.00 GiB, of which other processes hold 60.00 GiB; " in line
    suggested = line.split("batch.micro_batch_size=")[1]
    assert float(suggested.split("(")[1].split(" GiB")[0]) <= 20


def test_an_error_in_a_phase_is_told_with_the_innermost_one() -> None:
    clock = TimeShares()

    def work(error: Exception) -> None:
        with clock.phase("step"), clock.phase("backward"):
            raise error

    with pytest.raises(UserError, match="in the backward pass: "), \
            memory_told(lambda: clock.interrupted, *arguments()):
        work(MemoryError())
    other = ConfigError("a.b", "out of memory is its text")
    with pytest.raises(ConfigError) as caught, memory_told(lambda: clock.interrupted, *arguments()):
        work(other)
    assert caught.value is other
