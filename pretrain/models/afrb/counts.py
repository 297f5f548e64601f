"""Parameters, matrix products and activations of adapters and memories, in closed form; no torch.

Letters: D width, V vocabulary, T tokens, n blocks; dk, dv widths of addresses and values, K that of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.models.afrb.schema import AFRBConfig

CHUNK = 64
"""Tokens a chunk of a matrix memory read at every token (`pretrain.ops.associative_memory`)."""
GATED_CHUNK = 16
"""The same of rule gated, at any number of rows (`pretrain.ops.gated_memory`)."""
FADE_RANK = 16
"""Width between content and the decays of a gated memory."""
_FP32 = 4
_OF_TRAINED, _OF_TRAINED_ATTENDING = {True: 2, False: 1}, {True: 5, False: 3}
"""Widths D that a trained layer keeps beyond a frozen one, Llama's or GPT-2's."""


def adapter_parameters(cfg: AFRBConfig) -> int:
    """Trainable parameters, exact."""
    total = cfg.n_afrb * _block_parameters(cfg)
    if cfg.readout_from != "pvm":
        return total
    return total + (_matrix_parameters(cfg) if cfg.matrix else _readout_parameters(cfg))


def _block_parameters(cfg: AFRBConfig) -> int:
    d = cfg.hidden_size
    mixer = 2 * d * d + 2 * d if cfg.mixer == "glu" else (cfg.mixer_taps + 1) * d
    phase = {"rotate": 1, "embed": 3 * d + 1, "none": 0}[cfg.phase_mode]
    memory = 2 + _gate_parameters(cfg) if cfg.vector_pvm else 0
    return 5 * d + mixer + phase + memory + int(cfg.adaptive_omega)


def _gate_channels(cfg: AFRBConfig) -> int:
    return cfg.pvm_gate_marks or cfg.hidden_size


def _gate_parameters(cfg: AFRBConfig) -> int:
    if not cfg.pvm_write_gate:
        return 0
    return (cfg.pvm_gate_taps + 1) * _gate_channels(cfg) + cfg.pvm_gate_marks * cfg.hidden_size + 1


def _readout_parameters(cfg: AFRBConfig) -> int:
    d = cfg.hidden_size
    inner = max(1, d // 4)
    return d * d + 1 + (2 * d * inner + d + 3 * inner if cfg.learned_query else 0)


def _matrix_parameters(cfg: AFRBConfig) -> int:
    d, maps = cfg.hidden_size, 2 if cfg.pvm_separate_query else 1
    taps = cfg.pvm_address_taps * cfg.pvm_dk if cfg.pvm_phase_clock == "learned" else 0
    fade = FADE_RANK * d + (FADE_RANK + 1) * key_width(cfg) if cfg.pvm_rule == "gated" else 0
    return maps * d * cfg.pvm_dk + 2 * d * cfg.pvm_dv + taps + 1 + _gate_parameters(cfg) + fade


def key_width(cfg: AFRBConfig) -> int:
    """K: width of what a matrix memory is written at."""
    return 2 * cfg.pvm_content_frequencies if cfg.pvm_phase_clock == "content" else cfg.pvm_dk


def adapter_flops(cfg: AFRBConfig, seq_len: int) -> float:
    """Matrix products a token of one forward with a readout at every token of a sequence of `seq_len`."""
    d = cfg.hidden_size
    gate = 2 * _gate_channels(cfg) + 2 * d * cfg.pvm_gate_marks if cfg.pvm_write_gate else 0
    block = (4 * d * d if cfg.mixer == "glu" else 0) + (4 * d if cfg.phase_mode == "embed" else 0)
    total = float(cfg.n_afrb * (block + (gate if cfg.vector_pvm else 0)))
    if cfg.readout_from != "pvm":
        return total
    if cfg.matrix:
        return total + gate + _matrix_flops(cfg, seq_len)
    query = 4 * d * max(1, d // 4) if cfg.learned_query else 0
    weigh = 0 if cfg.readout_mode == "state" else 4 * seq_len * d * cfg.n_afrb
    return total + 2 * d * d + query + weigh


def _matrix_flops(cfg: AFRBConfig, seq_len: int) -> float:
    d, dk, dv, k = cfg.hidden_size, cfg.pvm_dk, cfg.pvm_dv, key_width(cfg)
    whiten = 3 * 2 * d * d
    maps = 2 * d * dk * (2 if cfg.pvm_separate_query else 1) + 4 * d * dv
    content = 2 * 2 * dk * cfg.pvm_content_frequencies if cfg.pvm_phase_clock == "content" else 0
    gated = cfg.pvm_rule == "gated"
    size = min(GATED_CHUNK if gated else CHUNK, seq_len)
    fade = 2 * FADE_RANK * (d + k) if gated else 0
    filled = -(-seq_len // size) * size / seq_len  # the last chunk is computed whole
    read = filled * (2 * size * (k + dv) + 4 * k * dv)
    delta = 0.0
    if cfg.pvm_rule == "delta":
        sizes = [min(CHUNK, seq_len - start) for start in range(0, seq_len, CHUNK)]
        delta = sum(2 * s * s * k + 4 * s * k * dv for s in sizes) / seq_len
    return whiten + maps + content + read + delta + fade + 2 * d * cfg.vocab_size


def activation_bytes(cfg: AFRBConfig, seq_len: int, scored: int, *, element_bytes: int, checkpointing: bool) -> float:
    """Bytes kept a token for the backward pass. Frozen matrices keep no inputs, so layers keep less than trained ones.

    `scored` of the tokens are read at. Coefficients are counts of the tensors that autograd keeps, in multiples of a
    width; a test holds them to it.
    """
    memory = _memory_bytes(cfg, seq_len, scored, element_bytes)
    if not cfg.n_afrb and not cfg.backbone.trained:  # nothing before the layers is: no gradient passes through them
        return memory
    layer, block = _layer_bytes(cfg, element_bytes), _block_bytes(cfg, element_bytes)
    mask = 0 if cfg.disable_attn else seq_len * element_bytes
    # Without attention only scored tokens go through the layers, unless a readout looks back at the others.
    passing = scored / seq_len if cfg.disable_attn and not cfg.looks_back else 1.0
    last = _norm_bytes(cfg, element_bytes)
    if cfg.backbone.trained:  # the last norm's scale and the output table
        last += element_bytes * cfg.hidden_size * (2 if cfg.backbone.body == "llama" else 1)
    layers, outside = passing * cfg.backbone.sizes.num_layers, passing * last + mask + memory
    if cfg.backbone.architecture == "gpt_neo" and not cfg.disable_attn:
        layer += _FP32 * cfg.backbone.sizes.num_heads * seq_len  # its attention keeps probabilities
    if checkpointing:
        stream = cfg.hidden_size * element_bytes
        traces = cfg.n_afrb * _FP32 * cfg.hidden_size if cfg.vector_pvm else 0
        working = 2 * max(passing * layer, block)  # computed again, and its gradients
        least = (layers + cfg.n_afrb) * stream + traces + working  # of one block it would be more than its own
        return min(least, layers * layer + cfg.n_afrb * block) + outside
    return layers * layer + cfg.n_afrb * block + outside


def _norm_bytes(cfg: AFRBConfig, e: int) -> float:
    """Input of one of the backbone's norms; Llama's compute in fp32."""
    return cfg.hidden_size * (_FP32 if cfg.backbone.body == "llama" else e)


def _layer_bytes(cfg: AFRBConfig, e: int) -> float:
    """One layer: inputs of norms and activations, and what attention keeps; of one that is trained, inputs of products.
    """
    sizes, norm = cfg.backbone.sizes, _norm_bytes(cfg, e)
    d, kv = sizes.hidden_size, sizes.kv_heads * sizes.head_dim
    llama = cfg.backbone.body == "llama"
    mlp = (3 if llama else 1) * sizes.mlp_size * e
    if cfg.backbone.trained:  # inputs of products and of the norms' scales
        mlp += e * (sizes.mlp_size + d * (_OF_TRAINED[llama] if cfg.disable_attn else _OF_TRAINED_ATTENDING[llama]))
    if not cfg.disable_attn:
        return 2 * norm + mlp + e * ((d + 2 * kv) if llama else 4 * d)
    return norm * (2 if cfg.disable_attn_mode == "identity" else 1) + mlp


def _block_bytes(cfg: AFRBConfig, e: int) -> float:
    d = cfg.hidden_size
    total = e * d * (7 if cfg.mixer == "glu" else 5)
    total += _FP32 * d * {"rotate": 3, "embed": 1, "none": 0}[cfg.phase_mode]
    return total + (_FP32 * (5 * d + _gate_kept(cfg)) if cfg.vector_pvm else 0)


def _gate_kept(cfg: AFRBConfig) -> int:
    """Numbers that a write gate keeps a token: of its convolution, and of its own features where it has any."""
    if not cfg.pvm_write_gate:
        return 0
    return 4 * _gate_channels(cfg) + (cfg.hidden_size if cfg.pvm_gate_marks else 0)


def _fade_kept(cfg: AFRBConfig, rows: float) -> float:
    """Numbers that rule gated keeps a token: decays, what they make of keys and queries, the chunks' states."""
    asked = 3.5 if rows < 1 else 0.0  # queries are put where they stand
    keys = key_width(cfg)
    return (10.5 + asked) * keys + 3.3 * keys * cfg.pvm_dv / GATED_CHUNK + FADE_RANK + 2 * GATED_CHUNK


def _memory_bytes(cfg: AFRBConfig, seq_len: int, scored: int, e: int) -> float:
    """Memory and readout: a part of every token, and a part of every row that is read at."""
    if cfg.readout_from != "pvm":
        return 0.0
    d, n, rows = cfg.hidden_size, cfg.n_afrb, scored / seq_len
    if cfg.matrix:
        keys = (3.8 if cfg.pvm_phase_clock == "content" else 2.8) * key_width(cfg)
        gate = _gate_kept(cfg)
        delta = 4 * cfg.pvm_dv + CHUNK if cfg.pvm_rule == "delta" else 0
        scores = 2 * CHUNK if rows == 1 else 3 * seq_len  # single rows are not read chunk by chunk
        fade = _fade_kept(cfg, rows) if cfg.pvm_rule == "gated" else 0
        return _FP32 * (2 * d + gate + cfg.pvm_dk + keys + cfg.pvm_dv + delta + fade
                        + rows * (1.1 * d + 4.8 * cfg.pvm_dv + scores))
    if cfg.readout_mode == "state":
        return _FP32 * d + rows * (1.75 * d * e + _FP32 * (2 + n) * d)
    return _FP32 * (1 + 2 * n) * d + rows * (1.75 * d * e + _FP32 * (2 * d + 2 * n * seq_len))
