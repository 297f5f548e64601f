"""Which precision to train in: what `engine.precision: auto` and `pretrain doctor` say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.config.run import Precision

DeviceKind = Literal["cpu", "cuda", "mps"]
_BF16_CAPABILITY = (8, 0)
_CPU_FLAGS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the advice depends on. All ranks must pass the same facts."""

    kind: DeviceKind
    cuda_capability: tuple[int, int] | None = None
    """(major, minor) of the weakest GPU, for CUDA."""
    cpu_flags: frozenset[str] = frozenset()
    """Instruction sets in the spelling of /proc/cpuinfo, for CPU."""


def advise_precision(facts: DeviceFacts, zero_stage: int) -> tuple[Precision, str]:
    """(precision, reason): bf16 where the hardware has it and the ZeRO stage trains it rightly, else fp32.

    bf16 weights need an fp32 master copy and fp32 gradient accumulation, which stages 2 and 3 keep; stage 0 would take
    a hidden optimizer step at start and stage 1 would accumulate in bf16.
    """
    has, hardware = _bf16_hardware(facts)
    if not has:
        return "fp32", f"{hardware}; bf16 would be emulated"
    if zero_stage not in (2, 3):
        return "fp32", f"{hardware}, but ZeRO stage {zero_stage} trains in fp32 only; stages 2 and 3 take bf16"
    return "bf16", f"{hardware}, and ZeRO stage {zero_stage} keeps fp32 master weights and gradients"


def _bf16_hardware(facts: DeviceFacts) -> tuple[bool, str]:
    if facts.kind == "cuda":
        if facts.cuda_capability is None:
            return False, "CUDA of unknown compute capability"
        name = "compute capability {}.{}".format(*facts.cuda_capability)
        return (True, f"{name} has bf16") if facts.cuda_capability >= _BF16_CAPABILITY else \
            (False, f"{name} is below {_BF16_CAPABILITY[0]}.{_BF16_CAPABILITY[1]}")
    if facts.kind == "cpu":
        flag = next((f for f in _CPU_FLAGS if f in facts.cpu_flags), None)
        return (True, f"this CPU has {flag}") if flag else (False, f"this CPU has neither of {', '.join(_CPU_FLAGS)}")
    return False, "MPS trains in fp32 here"
