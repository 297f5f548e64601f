"""Weights from elsewhere (`train.init_from`, say): whether token ids mean the same, what model came with them."""

from __future__ import annotations

import logging
from pathlib import Path

from data_prep.manifest import TOKENIZER, Manifest
from pretrain.config.inherit import config_of_weights, told_of_model
from pretrain.config.load import LoadedConfig, load_run_config
from pretrain.config.source import PairsConfig, ShardsConfig
from pretrain.data.batch import SampleSource
from pretrain.data.open import parts_of
from pretrain.errors import PretrainError, UserError
from pretrain.runfolder.publish import hash_file

_log = logging.getLogger("pretrain")


def check_initial(init_from: Path, source: SampleSource, key: str = "train.init_from") -> None:
    """Raise UserError where there is nothing at `init_from`, or its weights were trained with another tokenizer.

    `key` is the config key that names it. Where one of the two tokenizers is not known, nothing can be said.
    """
    if not init_from.exists():
        raise UserError(f"{key}: {init_from} does not exist")
    theirs = trained_tokenizer(init_from)
    for part, part_key in zip(*parts_of(source, "data.source"), strict=True):
        ours = getattr(part, "tokenizer_sha256", None)
        if theirs and ours and theirs != ours:
            raise UserError(f"{key}: {init_from} was trained with another tokenizer than that of {part_key} "
                            f"(SHA-256 {theirs[:12]} and {ours[:12]}); prepare the data with its tokenizer.json "
                            "(tokenizer.path)")


def trained_tokenizer(weights: Path) -> str | None:
    """SHA-256 of the tokenizer with which the weights of an export, a checkpoint or a run were trained, where known."""
    if (weights / TOKENIZER).is_file():
        return hash_file(weights / TOKENIZER)
    config_file = config_of_weights(weights)
    if config_file is None:
        return None
    try:
        source = load_run_config(config_file).config.data.source
        if not isinstance(source, ShardsConfig | PairsConfig):
            return None
        return Manifest.read(Path(source.path)).tokenizer_sha256
    except PretrainError:  # a checkpoint that was moved away from its run, or a run from its data
        return None


def tell_initial(loaded: LoadedConfig) -> None:
    """Log what of the model came with the weights of `train.init_from`, and warn of what this config has otherwise."""
    source = loaded.config.train.init_from
    inherited, differ = told_of_model(loaded.config.model, loaded.origins, Path(str(source)))
    if inherited:
        _log.info("train.init_from: as in %s: %s", source, ", ".join(inherited))
    if differ:
        _log.warning("train.init_from: %s has it otherwise, this config is used: %s", source, ", ".join(differ))
