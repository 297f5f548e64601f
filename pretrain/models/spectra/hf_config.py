"""`config.json` of Spectra: the schema's values under transformers' names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pretrain.models.spectra.schema import SpectraConfig


class SpectraHFConfig(PreTrainedConfig):
    """Everything that decides what the model computes; see `SpectraConfig` for the meaning of each value."""

    model_type = "spectra"

    def __init__(self, profile: str = "corrected", vocab_size: int = 30522, position_rows: int = 512,
                 hidden_size: int = 1024, num_hidden_layers: int = 24, num_attention_heads: int = 16,
                 intermediate_size: int = 4096, spectral_dim: int = 192, max_position_embeddings: int = 160,
                 dropout: float = 0.1, norm_position: str = "post", pooling: str = "mean", use_spectral: bool = True,
                 spectral_norm: str = "gate", spectral_entropy_gate: bool = False,
                 learnable_spectral_fusion: bool = True, fusion_init: float = 0.1, fusion_max: float = 0.5,
                 fractal_depth: int = 1, learnable_fractal: bool = True, fractal_init: float = 0.02,
                 attention_impl: str = "fused", enable_semantic: bool = True, enable_entity: bool = True,
                 enable_anchor64: bool = True, sem_dims: tuple[int, ...] = (768, 512, 256),
                 ent_dims: tuple[int, ...] = (384, 192, 96), anchor_dim: int = 64, retrieval_dim: int = 128,
                 ranking_dim: int = 1536, anomaly_basis: int = 16, anomalous_dim: int = 2048,
                 decay_exclude: bool = True, **kwargs: Any) -> None:
        self.profile = profile
        self.vocab_size = vocab_size
        self.position_rows = position_rows
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.spectral_dim = spectral_dim
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.norm_position = norm_position
        self.pooling = pooling
        self.use_spectral = use_spectral
        self.spectral_norm = spectral_norm
        self.spectral_entropy_gate = spectral_entropy_gate
        self.learnable_spectral_fusion = learnable_spectral_fusion
        self.fusion_init = fusion_init
        self.fusion_max = fusion_max
        self.fractal_depth = fractal_depth
        self.learnable_fractal = learnable_fractal
        self.fractal_init = fractal_init
        self.attention_impl = attention_impl
        self.enable_semantic = enable_semantic
        self.enable_entity = enable_entity
        self.enable_anchor64 = enable_anchor64
        self.sem_dims = tuple(sem_dims)
        self.ent_dims = tuple(ent_dims)
        self.anchor_dim = anchor_dim
        self.retrieval_dim = retrieval_dim
        self.ranking_dim = ranking_dim
        self.anomaly_basis = anomaly_basis
        self.anomalous_dim = anomalous_dim
        self.decay_exclude = decay_exclude
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class SpectraMLMHFConfig(SpectraHFConfig):
    """Task masked_lm; a type of its own, so that `AutoModel` finds the right class."""

    model_type = "spectra-mlm"

    def __init__(self, **kwargs: Any) -> None:
        kwargs["tie_word_embeddings"] = True
        super().__init__(**kwargs)


_RENAMED = {"max_positions": "position_rows", "max_length": "max_position_embeddings",
            "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "ffn_inner": "intermediate_size"}
_ELSEWHERE = {"family", "tokenizer", "task", "size", "trunk_init", "vocab_size_"}


def hf_config(cfg: SpectraConfig) -> SpectraHFConfig:
    """The transformers config of a schema."""
    values = {_RENAMED.get(key, key): value for key, value in cfg.model_dump().items() if key not in _ELSEWHERE}
    cls = SpectraMLMHFConfig if cfg.task == "masked_lm" else SpectraHFConfig
    return cls(vocab_size=cfg.vocab_size, anomalous_dim=cfg.anomalous_dim, **values)
