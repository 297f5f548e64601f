import itertools

import pytest

from pretrain.config.machine import cpu_flags, device_facts, memory_bytes, parse_gpus, stale_locks
from pretrain.config.precision import DeviceFacts, advise_precision

NEW_GPU, OLD_GPU = DeviceFacts("cuda", cuda_capability=(8, 0)), DeviceFacts("cuda", cuda_capability=(7, 5))
NEW_CPU, OLD_CPU = DeviceFacts("cpu", cpu_flags=frozenset({"avx512_bf16"})), DeviceFacts("cpu")
AMX = DeviceFacts("cpu", cpu_flags=frozenset({"amx_bf16", "avx2"}))
MPS = DeviceFacts("mps")


def test_bf16_exactly_where_hardware_and_stage_both_have_it():
    everything = (NEW_GPU, OLD_GPU, NEW_CPU, OLD_CPU, AMX, MPS, DeviceFacts("cuda"))
    for facts, stage in itertools.product(everything, range(4)):
        precision, reason = advise_precision(facts, stage)
        assert (precision == "bf16") == (facts in (NEW_GPU, NEW_CPU, AMX) and stage in (2, 3))
        assert precision in ("bf16", "fp32")
        assert reason


@pytest.mark.parametrize(("facts", "stage", "words"), [
    (OLD_GPU, 2, "7.5 is below 8.0"), (NEW_CPU, 1, "ZeRO stage 1 trains in fp32 only"), (OLD_CPU, 3, "neither of"),
    (AMX, 3, "amx_bf16"), (NEW_GPU, 3, "8.0 has bf16")])
def test_the_reason_names_what_decided(facts, stage, words):
    assert words in advise_precision(facts, stage)[1]


def test_the_weakest_gpu_decides():
    cards = parse_gpus("NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54\nTesla T4, 15360, 7.5, 550.54\nbroken\n, [N/A], x, y")
    assert [(card.name, card.memory_bytes, card.capability) for card in cards] == [
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20, (9, 0)), ("Tesla T4", 15360 * 2**20, (7, 5))]
    assert device_facts(cards) == OLD_GPU
    assert device_facts([]).kind == "cpu"


def test_flags_of_a_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: X\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor : 1\nflags : fpu\n")
    assert cpu_flags(info) == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags(tmp_path / "none") == frozenset()


def test_memory_is_that_of_the_machine_or_less():
    assert 2**28 < memory_bytes() < 2**50


def test_only_old_locks_are_stale(tmp_path, monkeypatch):
    import os
    import time
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, new = tmp_path / "py311_cpu" / "a" / "lock", tmp_path / "py311_cpu" / "b" / "lock"
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    assert stale_locks() == [old]
