"""Sizes of Spectra (section 1 of the specification) and what the compat profile changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Size = Literal["M300", "M456", "M600", "M700", "M1B", "M600-fit", "M700-fit", "M1B-fit"]


@dataclass(frozen=True, slots=True)
class SizeFacts:
    """Dimensions by config key, and the parameters that the name claims."""

    dimensions: dict[str, int]
    claimed: int | None


def _size(h: int, layers: int, heads: int, inner: int, s: int, length: int, claimed: int | None) -> SizeFacts:
    return SizeFacts({"hidden_size": h, "num_layers": layers, "num_heads": heads, "ffn_inner": inner,
                      "spectral_dim": s, "max_length": length}, claimed)


SIZES: dict[str, SizeFacts] = {
    "M300": _size(1024, 16, 16, 3584, 128, 128, 300_000_000),
    "M456": _size(1024, 24, 16, 4096, 192, 160, 458_000_000),
    "M600": _size(1280, 24, 20, 5120, 256, 192, 600_000_000),
    "M700": _size(1536, 24, 24, 6144, 384, 256, 700_000_000),
    "M1B": _size(2048, 32, 32, 8192, 512, 320, 1_000_000_000),
    "M600-fit": _size(1280, 24, 20, 3840, 256, 192, 600_000_000),
    "M700-fit": _size(1536, 24, 24, 3072, 384, 256, 700_000_000),
    "M1B-fit": _size(2048, 16, 32, 5632, 512, 320, 1_000_000_000),
}
COMPAT: dict[str, Any] = {"spectral_norm": "sum", "attention_impl": "explicit", "decay_exclude": False}
"""Defaults of `profile: compat`. Mask arithmetic, clamped fusion and initialisation follow the profile itself."""
