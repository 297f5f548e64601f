"""Other models made of a checkpoint's weights: the brackets between which a needle figure stands (AFRB spec, 19)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evaluation.target import DTYPES, Target, cast_parameters
from evaluation.untrained import untrained


@dataclass(frozen=True, slots=True)
class Variant:
    """What is changed of the model, and what it stands for."""

    name: str
    meaning: str
    changes: Mapping[str, Any]
    """Keys of the model's schema."""


_BARE = {"n_afrb": 0, "enable_pvm": False, "readout_from": "none", "kiss_ridge_calib": False}
VARIANTS = (
    Variant("backbone_without_attention", "no adapter, attention off: nothing can be carried to the answer",
            {**_BARE, "disable_attn": True}),
    Variant("backbone", "no adapter, attention on: the untouched backbone", {**_BARE, "disable_attn": False}),
    Variant("attention_on", "this adapter with the backbone's attention",
            {"disable_attn": False, "kiss_ridge_calib": False}),
)


def variants(target: Target) -> Iterator[tuple[Variant, Target]]:
    """The variants that this model's schema knows and that differ from the model itself.

    What a checkpoint leaves out (the attention of a backbone that ran without) comes from `model.backbone.weights`;
    where that names nothing, variants with attention are left out: a drawn one stands for nothing.
    """
    if target.config is None:
        return
    model = target.config.model
    weights = getattr(getattr(model, "backbone", None), "weights", None)
    trained_attention = weights is not None and Path(weights).is_dir()
    for variant in VARIANTS:
        known = all(hasattr(model, key) for key in variant.changes)
        same = known and all(getattr(model, key) == value for key, value in variant.changes.items()
                             if key != "kiss_ridge_calib")
        if known and not same and (trained_attention or variant.changes["disable_attn"]):
            yield variant, rebuilt(target, variant.changes)


@torch.no_grad()
def rebuilt(target: Target, changes: Mapping[str, Any]) -> Target:
    """The target's model with other keys of its schema, and its own weights wherever both have them."""
    assert target.config is not None
    config = target.config.model_copy(update={"model": target.config.model.model_copy(update=dict(changes))})
    model = untrained(config, target.device)
    own, theirs = model.state_dict(), target.model.state_dict()
    for name, value in own.items():
        if name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
    cast_parameters(model, DTYPES[target.dtype])
    return replace(target, model=model, module=model, config=config)
