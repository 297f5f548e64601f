"""Other models made of a checkpoint's weights: the brackets between which a needle figure stands (AFRB spec, 19)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evaluation.needle_controls import Expected
from evaluation.target import DTYPES, Target, cast_parameters
from evaluation.untrained import untrained
from pretrain.config.model import ModelConfig
from pretrain.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """What is changed of the model, and what it stands for."""

    name: str
    meaning: str
    changes: Mapping[str, Any]
    """Keys of the model's schema."""
    expected: Expected = "reported"
    """See `Control`."""


_BARE = {"n_afrb": 0, "enable_pvm": False, "readout_from": "none"}
VARIANTS = (
    Variant("backbone_without_attention", "no adapter, attention off: nothing can be carried to the answer",
            {**_BARE, "disable_attn": True}, "uniform"),
    Variant("backbone", "no adapter, attention on: the untouched backbone",
            {**_BARE, "disable_attn": False, "attention_window": None}),
    Variant("attention_on", "this adapter with the backbone's attention", {"disable_attn": False}),
    Variant("attention_off", "this adapter without the backbone's attention", {"disable_attn": True}),
)


BETAS = (0.5, 0.85, 0.95, 0.99, 0.999)
"""Retentions at which a memory is read as well: what it finds must grow with its reach."""


def variants(target: Target, length: int, *, sweep: bool = True, only: str | None = None
             ) -> Iterator[tuple[Variant, Target]]:
    """The variants that this model's schema knows, that differ from the model itself and take `length` tokens.

    What a checkpoint leaves out (the attention of a backbone that ran without) comes from `model.backbone.weights`;
    where that names nothing, variants with attention are left out: a drawn one stands for nothing. `sweep` adds other
    retentions of a memory; `only` is the name of the one that is wanted.
    """
    for variant, model in _changed(target, sweep):
        if only in (None, variant.name) and (model.max_seq_len is None or model.max_seq_len >= length):
            yield variant, rebuilt(target, variant.changes)


def left_out(target: Target, length: int) -> dict[str, str]:
    """Why each of the variants that do not take `length` tokens is left out, by name."""
    return {variant.name: f"not asked: takes {model.max_seq_len:,} tokens, {length:,} are needed"
            for variant, model in _changed(target, sweep=False)
            if model.max_seq_len is not None and model.max_seq_len < length}


def _changed(target: Target, sweep: bool) -> Iterator[tuple[Variant, ModelConfig]]:
    """The variants whose weights are at hand, with their schema."""
    if target.config is None:
        return
    model = target.config.model
    weights = getattr(getattr(model, "backbone", None), "weights", None)
    trained_attention = weights is not None and Path(weights).is_dir()
    for variant in (*VARIANTS, *(_retentions(model) if sweep else ())):
        known = all(hasattr(model, key) for key in variant.changes)
        same = known and all(getattr(model, key) == value for key, value in variant.changes.items())
        needs_attention = variant.changes.get("disable_attn") is False
        if known and not same and (trained_attention or not needs_attention):
            yield variant, model.model_copy(update=dict(variant.changes))


def _retentions(model: ModelConfig) -> Iterator[Variant]:
    """The sweep over the retention of a memory; one that learns what it keeps has none."""
    if getattr(model, "enable_pvm", False) and getattr(model, "pvm_rule", None) != "gated":
        for beta in BETAS:
            yield Variant(f"beta_{beta:g}", f"retention {beta:g} a token", {"pvm_beta": beta})


def _nothing_measured(config: RunConfig) -> dict[str, Any]:
    """Changes with which hooks fit and measure nothing before the first step."""
    known = {"pvm_scale": 1.0, "kiss_ridge_calib": False}
    return {key: value for key, value in known.items() if hasattr(config.model, key)}


@torch.no_grad()
def rebuilt(target: Target, changes: Mapping[str, Any]) -> Target:
    """The target's model with other keys of its schema, and its own weights wherever both have them.

    What only the changed model has comes from where a fresh run takes it, `train.init_from` or not: that run's weights
    are those of the unchanged model. What a fresh run would measure first is among its own weights, so that nothing is
    measured: its samples may be longer than the backbone takes with attention.
    """
    assert target.config is not None
    own_config = target.config
    config = own_config.model_copy(update={
        "model": own_config.model.model_copy(update=dict(changes)),
        "train": own_config.train.model_copy(update={"init_from": None})})
    model = untrained(config.model_copy(update={"model": config.model.model_copy(update=_nothing_measured(config))}),
                      target.device)
    own, theirs = model.state_dict(), target.model.state_dict()
    for name, value in own.items():
        if name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
    cast_parameters(model, DTYPES[target.dtype])
    return replace(target, model=model, module=model, config=config, max_seq_len=config.model.max_seq_len)
