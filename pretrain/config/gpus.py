"""Memory of known devices, for estimates of machines that are not this one. Peaks of arithmetic are the monitor's."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.suggest import nearest
from pretrain.errors import UserError


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """One kind of device, as its data sheet has it."""

    memory_bytes: int
    bandwidth: float
    """Bytes a second of its memory."""


_GB = 10**9
KNOWN: dict[str, KnownGpu] = {
    "B200": KnownGpu(180 * _GB, 7.7e12),  # NVIDIA HGX B200 specifications, a GPU
    "H200": KnownGpu(141 * _GB, 4.8e12),  # NVIDIA H200 data sheet
    "H100": KnownGpu(80 * _GB, 3.35e12),  # NVIDIA H100 data sheet, SXM
    "H100 NVL": KnownGpu(94 * _GB, 3.9e12),  # NVIDIA H100 data sheet, NVL
    "H100 PCIe": KnownGpu(80 * _GB, 2.0e12),  # NVIDIA H100 data sheet, PCIe
    "A100 80GB": KnownGpu(80 * _GB, 2.039e12),  # NVIDIA A100 data sheet, SXM 80 GB
    "A100 40GB": KnownGpu(40 * _GB, 1.555e12),  # NVIDIA A100 data sheet, 40 GB
    "L40S": KnownGpu(48 * _GB, 0.864e12),  # NVIDIA L40S data sheet
    "MI300X": KnownGpu(192 * _GB, 5.3e12),  # AMD Instinct MI300X data sheet
}


def known_gpu(name: str) -> KnownGpu:
    """The device of that name. Raises UserError with the nearest right one."""
    if name not in KNOWN:
        raise UserError(f'--gpu "{name}" is not known{nearest(name, KNOWN)}; known: {", ".join(KNOWN)}; for another '
                        "one give --tokens-per-second, or --peak-flops and --mfu")
    return KNOWN[name]
