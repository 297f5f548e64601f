"""Numbers that AFRB keeps a sequence while decoding, beside the key/value cache of the same backbone with attention."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import write_results
from pretrain.config.load import load_run_config
from pretrain.models.afrb.family import FAMILY
from pretrain.models.base import BuildContext

LENGTHS = (512, 2048)
ATTENTION = ["model.disable_attn=false", "model.n_afrb=0", "model.enable_pvm=false", "model.readout_from=none",
             "model.kiss_ridge_calib=false"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "key/value cache of the backbone": ("afrb-baseline-small", ATTENTION),
    "vector memory, trace readout (the claim's preset)": ("afrb-reproduce-10pct-small", []),
    "vector memory, state readout": ("afrb-reproduce-10pct-small", ["model.readout_mode=state"]),
    "matrix memory 256 x 256 (afrb-retrieve)": ("afrb-retrieve-small", []),
    "matrix memory 640 x 256 (afrb-retrieve-2k)": ("afrb-retrieve-2k-small", []),
    "matrix memory 512 x 128, delta rule (afrb-retrieve-text)": ("afrb-retrieve-text-small", []),
    "matrix memory 64 x 64, gated (afrb-retrieve-tag)": ("afrb-retrieve-tag-small", []),
}


@torch.no_grad()
def measure(preset: str, sets: list[str]) -> dict[str, int]:
    """Numbers in the state after so many tokens, by their count."""
    config = load_run_config(preset, sets).config.model
    model = FAMILY.build(config, BuildContext(seed=0)).eval()  # type: ignore[arg-type]
    found = {}
    for length in LENGTHS:
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        state = model(tokens, use_cache=True, return_logits=True, logits_to_keep=1).past_key_values
        cache = [] if state.backbone is None else [layer for layer in state.backbone.layers]
        found[str(length)] = state.numel() + sum(layer.keys.numel() + layer.values.numel() for layer in cache)
    return found


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: measure(*kind) for name, kind in KINDS.items()}
    cache = next(iter(found.values()))
    for name, numbers in found.items():
        numbers["cache_over_it_at_512"] = cache["512"] / numbers["512"]
        print(f"{name}: {numbers['512']:,} numbers at 512 tokens, {numbers['2048']:,} at 2048; the cache is "
              f"{numbers['cache_over_it_at_512']:.1f} times as large at 512")
    write_results("afrb_state", found)


if __name__ == "__main__":
    main()
