"""FLOPs and activations of Spectra in closed form. Symbols as in schema.py; T tokens a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.models.spectra.schema import SpectraConfig

_FP32_BYTES = 4


def flops_per_token(cfg: SpectraConfig, length: int) -> float:
    """Matrix products of one forward pass: a multiply-add is 2, attention over all T x T pairs."""
    h = cfg.hidden_size
    block = 2 * (4 * h * h + 3 * h * cfg.ffn_inner) + _attention_flops(cfg, length)
    if cfg.use_spectral:
        block += 2 * 4 * h * cfg.spectral_dim + 4 * length * cfg.spectral_dim
    total = float(cfg.num_layers * block)
    if cfg.task == "masked_lm":
        return total + 2 * h * h + 2 * h * cfg.vocab_size
    return total + _head_flops(cfg) / length


def _attention_flops(cfg: SpectraConfig, length: int) -> int:
    """A token of one layer: both products, and what enrichment adds."""
    h = cfg.hidden_size
    if cfg.attention_impl == "explicit":
        return 4 * length * h + 2 * cfg.fractal_depth * length * length * cfg.num_heads
    if cfg.fractal_depth == 0:
        return 4 * length * h
    # Logits of twice the width; C, R, C q and R u, each d x d a head.
    return 6 * length * h + 4 * 2 * h * cfg.head_dim


def _head_flops(cfg: SpectraConfig) -> int:
    """A text."""
    h, am, s = cfg.hidden_size, cfg.anomalous_dim, cfg.spectral_dim
    width = _vector_widths(cfg)
    ranking = 2 * h * h + 2 * h * am + am * s + s * s + cfg.anomaly_basis * am + cfg.ranking_dim * (am + s)
    return 2 * (width * h + h * h + h * cfg.retrieval_dim + ranking)


def _vector_widths(cfg: SpectraConfig) -> int:
    """Coordinates of the heads that can be switched off, those that are on."""
    return (cfg.sem_dims[0] * cfg.enable_semantic + cfg.ent_dims[0] * cfg.enable_entity
            + cfg.anchor_dim * cfg.enable_anchor64)


def activation_bytes_per_token(cfg: SpectraConfig, length: int, *, element_bytes: int, checkpointing: bool) -> float:
    """Bytes kept for the backward pass at dropout 0, a token of rows of `length`."""
    inside, outside = _block_bytes(cfg, length, element_bytes), _outer_bytes(cfg, length, element_bytes)
    if checkpointing and cfg.num_layers > 1:  # the input of each block, and one at a time while it is computed again
        return cfg.num_layers * cfg.hidden_size * element_bytes + inside + outside
    return cfg.num_layers * inside + outside


def _block_bytes(cfg: SpectraConfig, length: int, element: int) -> float:
    """Inputs of products and norms; q and k, the features made of them, and the S x S parts of both branches."""
    widths = 9.0 if cfg.attention_impl == "explicit" or cfg.fractal_depth == 0 else 16.0
    square = 0.0
    if cfg.attention_impl == "explicit":  # probabilities; a round's logits before and after zeroing, and its product
        square = cfg.num_heads * (_FP32_BYTES * (1 + 3 * cfg.fractal_depth) * length)
        if element < _FP32_BYTES:
            widths, square = widths + 2, square + element * cfg.num_heads * length
    spectral = 0.0
    if cfg.use_spectral:  # gates, the same over their sum, and what of them the product takes
        kept = 2 if cfg.spectral_norm == "gate" else 1
        spectral = cfg.spectral_dim * 2 * (element + _FP32_BYTES) + length * (kept * _FP32_BYTES + element)
    else:
        widths -= 1
    return element * (widths * cfg.hidden_size + 4 * cfg.ffn_inner + 6) + 4 * cfg.num_heads + square + spectral


def _outer_bytes(cfg: SpectraConfig, length: int, element: int) -> float:
    """Last norm and what follows: the transform of the masked-LM, or the share a token has in the heads of its text."""
    h, am, s = cfg.hidden_size, cfg.anomalous_dim, cfg.spectral_dim
    if cfg.task == "masked_lm":
        return element * 5 * h
    vectors = _vector_widths(cfg) + cfg.retrieval_dim + cfg.ranking_dim
    return element * (h + (4 * am + 3 * s + 9 * h + 2 * vectors) / length)
