"""Names to import strings. Adding a family is one folder, one preset and one line here; nothing else knows names.

Values are `"module:attribute"` and are imported on first use, so that listing and validating stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from pretrain.config.suggest import nearest
from pretrain.errors import ConfigError

MODEL_SCHEMAS: dict[str, str] = {
    "afrb": "pretrain.models.afrb.schema:AFRBConfig",
    "baseline": "pretrain.models.baseline.schema:BaselineConfig",
    "spectra": "pretrain.models.spectra.schema:SpectraConfig",
}
FAMILIES: dict[str, str] = {
    "afrb": "pretrain.models.afrb.family:FAMILY",
    "baseline": "pretrain.models.baseline.family:FAMILY",
    "spectra": "pretrain.models.spectra.family:FAMILY",
}
OBJECTIVE_SCHEMAS: dict[str, str] = {
    "causal_lm": "pretrain.config.objective:CausalLMConfig",
    "contrastive": "pretrain.config.contrastive:ContrastiveConfig",
    "masked_lm": "pretrain.config.objective:MaskedLMConfig",
    "needle": "pretrain.config.objective:NeedleObjectiveConfig",
}
OBJECTIVES: dict[str, str] = {
    "causal_lm": "pretrain.objectives.causal_lm:CausalLM",
    "contrastive": "pretrain.objectives.contrastive:Contrastive",
    "masked_lm": "pretrain.objectives.masked_lm:MaskedLM",
    "needle": "pretrain.objectives.needle:Needle",
}
SOURCE_SCHEMAS: dict[str, str] = {
    "shards": "pretrain.config.source:ShardsConfig",
    "remote": "pretrain.config.source:RemoteConfig",
    "pairs": "pretrain.config.source:PairsConfig",
    "mixture": "pretrain.config.source:MixtureConfig",
    "synthetic": "pretrain.config.source:SyntheticConfig",
    "needle": "pretrain.config.needle:NeedleConfig",
}
SOURCES: dict[str, str] = {
    "shards": "pretrain.data.shards:open_shards",
    "remote": "pretrain.data.remote_shards:open_remote",
    "pairs": "pretrain.data.pairs:open_pairs",
    "mixture": "pretrain.data.mixture:open_mixture",
    "synthetic": "pretrain.data.synthetic:open_synthetic",
    "needle": "pretrain.data.needle:open_needle",
}


def resolve(table: dict[str, str], name: str, key: str) -> Any:
    """Import what `table[name]` points to. Raises ConfigError at `key` with the nearest right name."""
    if name not in table:
        raise ConfigError(key, f'"{name}" is not known{nearest(name, table)}; known: {", ".join(sorted(table))}')
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)
