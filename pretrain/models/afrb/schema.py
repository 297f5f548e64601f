"""Schema of AFRB: resonant adapters and phase vector memory on a frozen causal language model (spec, section 16)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.model import ModelConfig, ParameterCount
from pretrain.errors import ConfigError
from pretrain.models.afrb.backbone_schema import BackboneConfig, DisableAttention
from pretrain.models.afrb.counts import activation_bytes, adapter_flops, adapter_parameters

PhaseMode = Literal["rotate", "embed", "none"]
Clock = Literal["log", "token", "content", "learned", "none"]
Ladder = Literal["scalar", "ladder", "uniform", "rope"]
_BY_MEMORY: dict[str, dict[str, Any]] = {
    "vector": {"pvm_beta": 0.85, "pvm_phase_clock": "log", "pvm_omega_mode": "scalar", "pvm_gate_taps": 4},
    "matrix": {"pvm_beta": 1.0, "pvm_phase_clock": "token", "pvm_omega_mode": "uniform", "pvm_gate_taps": 24},
}
_NOT_AVAILABLE = {
    "enable_plm": "the 2-D lattice memory is not implemented: no usable description of it is published",
    "pcm_enable": "the learned offset memory is not implemented: no usable description of it is published",
    "pvm_carry_state": "memories begin anew at each sequence; to stream, give past_key_values to forward",
    "stillness_ema": "is not implemented: no formula of it is published",
    "pvm2emb_ridge_recalib": "recalibration while training is not implemented; calibration runs before the first step",
}
_IGNORED = {
    "sir_dim": "of the original only", "hard_pointer_scale": "of the original only: the option injects the answer",
    "mem_acc_exact": "of the original only", "phase_alignment_weight": "phases are not learned, so a penalty on them "
    "changes nothing",
}
_OF_VECTOR = ("pvm_alpha", "pvm_gate_init", "pvm_order", "t2_enable", "readout_mode", "readout_tau", "readout_topk",
              "readout_scale", "readout_window", "needle_query_mode")
_OF_MATRIX = ("pvm_dk", "pvm_dv", "pvm_address_taps", "pvm_query_taps", "pvm_address_decay", "pvm_rule",
              "pvm_separate_query", "pvm_init", "pvm_read")


class AFRBConfig(ModelConfig):
    """AFRB: what stands between embedding and first layer, what is remembered, and how it is read out."""

    changeable: ClassVar[frozenset[str]] = frozenset({
        "weights", "block_warm_delta", "block_ramp", "phase_ramp", "kiss_ridge_unfreeze_step",
        "freeze_readout_steps", "adaptive_omega_lr", "adaptive_omega_interval", "scalar_lr_scale",
        "skip_phase_metrics", "phase_curvature_metrics"})

    family: Literal["afrb"] = "afrb"
    backbone: BackboneConfig

    n_afrb: int = Field(1, ge=0, le=4, description="adapter blocks between embedding and first layer; 0 = baseline")
    alpha: float = Field(0.04, ge=0, le=1, description="phase blend of the first block; 0.01 to 0.1 is usual")
    gamma: float = Field(0.20, gt=0, lt=1, description="initial value of the learned gate of the phase branch")
    omega: float = Field(6.0, gt=0, le=1000, description="phase frequency of the first block")
    omega_delta: float = Field(0.0, ge=-100, le=100, description="frequency step from block to block")
    phase_delta: float = Field(0.0, ge=0, le=6.2832, description="phase offset from block to block, rad")
    cascade_lambda: float = Field(0.0, ge=0, le=10, description="decay of alpha from block to block")
    cascade_kappa: float = Field(0.0, ge=0, le=10, description="decay of gamma from block to block")
    phase_mode: PhaseMode = Field("rotate", description="rotate turns features; embed adds a positional signal (the "
                                  "original); none leaves the mixer alone (a null adapter)")
    layerscale_init: float = Field(0.0, ge=0, le=1, description="initial scale of a block's output; 0 starts as the "
                                   "identity, 1 is the original")
    mixer: Literal["glu", "conv"] = Field("glu", description="glu acts on tokens alone, conv on the last few")
    mixer_taps: int = Field(4, ge=2, le=64, description="mixer conv: tokens it sees")
    adaptive_omega: bool = Field(False, description="learn the frequencies within omega_min and omega_max")
    adaptive_omega_lr: float = Field(1e-7, gt=0, le=1, description="their learning rate; 1e-4 or more to see movement")
    adaptive_omega_interval: int = Field(10, ge=1, description="steps between their updates")
    omega_min: float = Field(5.6, gt=0, description="adaptive_omega: lower bound")
    omega_max: float = Field(6.4, gt=0, description="adaptive_omega: upper bound")
    block_warm_delta: int = Field(0, ge=0, description="steps between the activation of one block and the next")
    block_ramp: int = Field(300, ge=0, description="steps over which a block's phase branch is ramped up")
    phase_ramp: int = Field(300, ge=0, description="steps over which phase offsets are ramped up (phase_delta > 0)")

    enable_pvm: bool = Field(False, description="phase vector memory")
    pvm_memory: Literal["vector", "matrix"] = Field(
        "vector", description="vector: a decaying sum in each block; matrix: an associative memory of tokens")
    pvm_alpha: float = Field(0.3, gt=0, le=1, description="vector: write strength")
    pvm_beta: float = Field(0.85, gt=0, le=1, description="retention a token; default 0.85 (vector) or 1 (matrix)")
    pvm_gate_init: float = Field(-2.0, ge=-20, le=20, description="vector: initial logit of its gate into the block")
    pvm_order: Literal["rotate_then_accumulate", "accumulate_then_rotate"] = Field(
        "rotate_then_accumulate", description="vector: the second is the original and stores no time")
    pvm_phase_clock: Clock = Field(
        "log", description="what turns phases: log time, token count, content (phases are random features of the "
        "address), learned taps, none; default log (vector) or token (matrix)")
    pvm_omega_mode: Ladder = Field(
        "scalar", description="frequency of each channel pair: one for all, log-spaced in [1, 600], uniform in [0, 2 "
        "pi) or RoPE's; default scalar (vector) or uniform (matrix)")
    pvm_write_gate: bool = Field(False, description="learned gate of writes, from a causal convolution")
    pvm_gate_taps: int = Field(4, ge=1, le=64, description="tokens the write gate sees; default 4 (vector) or 24 "
                               "(matrix)")
    pvm_gate_marks: int = Field(0, ge=0, le=4096, description="learned features of each token that the gate's "
                                "convolution runs over, so that a reserved token stands out by itself; 0: the token's "
                                "own channels")
    pvm_write_gate_init: float = Field(-2.0, ge=-20, le=20, description="initial logit of the write gate")
    pvm_dk: int = Field(256, ge=2, le=65536, description="matrix: width of addresses")
    pvm_dv: int = Field(128, ge=1, le=65536, description="matrix, content: width of values")
    pvm_address_taps: int = Field(4, ge=1, le=64, description="tokens an address is made of")
    pvm_query_taps: int | None = Field(None, ge=1, le=64, description="tokens an address that is asked for is made of; "
                                       "null: the same")
    pvm_address_decay: float = Field(1.0, gt=0, le=1, description="weight of each token of an address over the next")
    pvm_content_frequencies: int = Field(256, ge=1, le=1 << 20, description="content: number of random phases")
    pvm_content_sigma: float = Field(2.5, gt=0, le=100, description="content: how sharply addresses must match")
    pvm_rule: Literal["hebb", "delta", "gated"] = Field(
        "hebb", description="matrix: add values, or what is missing of them, or add and let each row of the state fade "
        "as content says (gated linear attention)")
    pvm_fade_init: float = Field(6.0, ge=-20, le=20, description="gated: initial logit of what a row keeps a token, of "
                                 "which it keeps the 16th root; 0 is the published one and forgets in tens of tokens")
    pvm_delta_rate: float = Field(0.1, gt=0, le=1, description="delta: share of what is missing")
    pvm_separate_query: bool = Field(False, description="matrix: a projection of its own for queries")
    pvm_init: Literal["structured", "random"] = Field(
        "structured", description="matrix: orthogonal maps that retrieve before training, or independent random ones")
    pvm_read: Literal["chain", "step"] = Field(
        "chain", description="matrix: ask with the last tokens, or step a read head from where reading began")
    pvm_row_norm: bool = Field(True, description="matrix: divide logits by the norm of the whitened output row")
    pvm_scale: float | None = Field(None, gt=0, description="matrix: initial factor of its logits; null: 9 x what "
                                    "the backbone's first choice stands above its mean, measured before the first step")
    t2_enable: bool = Field(False, description="vector: further retention factor")
    t2_mode: Literal["exp", "resonant"] = Field("exp", description="constant, or a modulated envelope")
    t2_steps: float = Field(1500.0, gt=0, description="exp: tokens to 1/e")
    t2_k: float = Field(0.001, ge=0, description="resonant: decay a token")
    t2_alpha: float = Field(0.08, ge=0, lt=1, description="resonant: depth of the modulation")
    t2_omega: float = Field(6.0, description="resonant: its frequency in log time")
    t2_phi: float = Field(1.0472, description="resonant: its phase, rad")

    readout_from: Literal["pvm", "none"] = Field("none", description="what is added to the logits; default pvm where "
                                                 "there is one")
    readout_mode: str = Field("trace", pattern=r"^(trace|state|window:[1-9][0-9]*)$",
                              description="vector: attention over all states, the last state, or the last K states")
    readout_tau: float = Field(0.05, gt=0, le=10, description="trace, window: initial learned temperature")
    readout_topk: int = Field(0, ge=0, description="trace, window: states that count; 0 = all")
    readout_scale: float = Field(1.0, ge=0, le=10, description="vector: factor of its logits")
    readout_window: int = Field(16, ge=1, le=64, description="vector: tokens of the query")
    needle_query_mode: Literal["mean_tail", "learned", "phase_weighted"] = Field(
        "mean_tail", description="vector: how the query is made of the last hidden states")
    readout_head: Literal["shared"] = Field("shared", description="the backbone's output table")
    readout_replace: bool = Field(False, description="at given readout rows, leave the backbone's own logits out")
    kiss_ridge_calib: bool = Field(False, description="fit the readout map before the first step, by ridge regression")
    kiss_ridge_max_pairs: int = Field(512, ge=64, description="pairs it is fitted to")
    kiss_ridge_l2: float = Field(1e-3, ge=1e-9, le=10, description="its penalty, times the mean square of features")
    kiss_ridge_l2_absolute: bool = Field(False, description="the penalty as it stands (the original)")
    kiss_ridge_target: Literal["rows", "dual"] = Field(
        "rows", description="vector: output rows, or the whitened ones that score them alike (matrix always has those)")
    kiss_ridge_unfreeze_step: int = Field(100, ge=0, description="the fitted map is trained from here; 0 = never")
    kiss_ridge_force: bool = Field(False, description="fit again although the weights come from a calibrated run")
    freeze_readout_steps: int = Field(0, ge=0, description="steps before a learned query is trained")
    scalar_lr_scale: float = Field(1.0, gt=0, le=1000, description="learning rate of gates, temperatures and scales "
                                   "over optim.lr")

    disable_attn: bool = Field(False, description="take the backbone's self-attention out")
    disable_attn_mode: DisableAttention = Field("zero", description="what it adds then: nothing, or (the original) its "
                                                "normalised input")

    attention_window: int | None = Field(None, ge=1, description="where attention is kept, tokens each token attends "
                                         "to, itself included; null: all, or as the backbone was trained")

    skip_phase_metrics: bool = Field(False, description="evaluations measure no phases")
    phase_curvature_metrics: bool = Field(False, description="evaluations also measure where a vector memory's path "
                                          "bends, over all validation needles")

    enable_plm: bool = Field(False, description="not implemented")
    pcm_enable: bool = Field(False, description="not implemented")
    pvm_carry_state: bool = Field(False, description="refused; see forward's past_key_values")
    stillness_ema: float = Field(0.0, ge=0, le=1, description="not implemented")
    pvm2emb_ridge_recalib: int = Field(0, ge=0, description="not implemented")
    phase_alignment_weight: float = Field(0.0, ge=0, description="accepted, without effect")
    sir_dim: int | None = Field(None, description="accepted, without effect")
    hard_pointer_scale: float | None = Field(None, description="accepted, without effect")
    mem_acc_exact: bool | None = Field(None, description="accepted, without effect")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Fill in what depends on the kind of memory; refuse sources of readout that do not exist."""
        if not isinstance(values, dict):
            return values
        source = values.get("readout_from")
        if source == "plm":
            raise ConfigError("model.readout_from", f"plm: {_NOT_AVAILABLE['enable_plm']}; use pvm or none")
        if source in (None, "auto", "both"):
            values = {**values, "readout_from": "pvm" if values.get("enable_pvm") or source == "both" else "none"}
        if values.get("readout_head") == "separate":
            raise ConfigError("model.readout_head", "separate is not implemented; use shared")
        return {**_BY_MEMORY.get(str(values.get("pvm_memory", "vector")), {}), **values}

    @model_validator(mode="after")
    def _checked(self) -> AFRBConfig:
        for key, reason in _NOT_AVAILABLE.items():
            if getattr(self, key):
                raise ConfigError(f"model.{key}", f"{getattr(self, key)}: {reason}")
        if self.enable_pvm and not self.matrix:
            if not self.n_afrb:
                raise ConfigError("model.enable_pvm", "a vector memory stands in a block, but model.n_afrb is 0; use 1 "
                                  "to 4, or model.pvm_memory matrix")
            if self.pvm_beta >= 1:
                raise ConfigError("model.pvm_beta", f"{self.pvm_beta:g}: a vector memory needs a retention below 1")
            if self.pvm_phase_clock in ("learned", "content"):
                raise ConfigError("model.pvm_phase_clock", f"{self.pvm_phase_clock} makes addresses, which a vector "
                                  "memory has none of; use log, token or none, or model.pvm_memory matrix")
        if self.readout_from == "pvm" and not self.enable_pvm:
            raise ConfigError("model.readout_from", "pvm needs model.enable_pvm true; set that, or use none")
        if self.kiss_ridge_calib and self.readout_from != "pvm":
            raise ConfigError("model.kiss_ridge_calib", "fits the map from memory to output table, but model."
                              "readout_from is none; use pvm, or leave the calibration out")
        if self.query_taps > self.pvm_address_taps:
            raise ConfigError("model.pvm_query_taps", f"{self.pvm_query_taps} is above model.pvm_address_taps "
                              f"{self.pvm_address_taps}; an address that is asked for has no more tokens than one that "
                              "is written at")
        if self.pvm_read == "step" and self.pvm_phase_clock not in ("token", "content"):
            raise ConfigError("model.pvm_read", f"step turns by one token's phase, which model.pvm_phase_clock "
                              f"{self.pvm_phase_clock} does not have; use clock token or content, or read chain")
        if self.pvm_rule == "gated" and (self.pvm_beta < 1 or self.pvm_read == "step"):
            raise ConfigError("model.pvm_rule", "gated learns what it keeps and reads at the tokens asked; use "
                              "model.pvm_beta 1 and model.pvm_read chain")
        if self.adaptive_omega and self.phase_mode == "none":
            raise ConfigError("model.adaptive_omega", "learns phase frequencies, but model.phase_mode is none")
        for block in self.block_profile() if self.adaptive_omega else ():
            if not self.omega_min <= block["omega"] <= self.omega_max:
                raise ConfigError("model.omega", f"{block['omega']:g}, at which a block begins, lies outside of "
                                  f"omega_min {self.omega_min:g} to omega_max {self.omega_max:g}; widen the bounds")
        return self

    @property
    def kind(self) -> Literal["causal_lm", "encoder"]:
        """It predicts the next token."""
        return "causal_lm"

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's tables."""
        return self.backbone.sizes.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width D of the backbone."""
        return self.backbone.sizes.hidden_size

    @property
    def max_seq_len(self) -> int | None:
        """The backbone's, where it has positions; without attention Llama's have none."""
        free = self.disable_attn and self.backbone.body == "llama"
        return None if free else self.backbone.sizes.max_position_embeddings

    @property
    def matrix(self) -> bool:
        """Whether the memory is one of tokens, beside the blocks, rather than one in each block."""
        return self.pvm_memory == "matrix"

    @property
    def vector_pvm(self) -> bool:
        """Whether blocks hold a memory."""
        return self.enable_pvm and not self.matrix

    @property
    def matrix_pvm(self) -> bool:
        """Whether there is an associative memory of tokens."""
        return self.enable_pvm and self.matrix

    @property
    def attention_reach(self) -> int | None:
        """Tokens that attention sees, itself included: the least of the section's window and the backbone's own."""
        return min((window for window in (self.attention_window, self.backbone.attention_window) if window is not None),
                   default=None)

    @property
    def disabled_attention(self) -> DisableAttention | None:
        """How attention is taken out; None where it is kept."""
        return self.disable_attn_mode if self.disable_attn else None

    @property
    def query_taps(self) -> int:
        """Tokens of an address that is asked for, resolved."""
        return self.pvm_query_taps or self.pvm_address_taps

    @property
    def history(self) -> int | None:
        """Last states that a windowed readout sees; None without a window."""
        return int(self.readout_mode.removeprefix("window:")) if self.readout_mode.startswith("window:") else None

    @property
    def learned_query(self) -> bool:
        """Whether a vector readout makes its query by a learned map; one of the last state asks nothing."""
        return self.needle_query_mode == "learned" and self.readout_mode != "state"

    @property
    def looks_back(self) -> bool:
        """Whether what is read at a token depends on hidden states of tokens before it."""
        return self.vector_pvm and self.readout_from == "pvm" and self.readout_mode != "state"

    def notes(self) -> list[str]:
        """What is accepted and changes nothing, one line each."""
        found = [f"model.{key}: {why}; ignored" for key, why in _IGNORED.items() if getattr(self, key)]
        if self.enable_pvm:
            own, keys = ("vector", _OF_MATRIX) if not self.matrix else ("matrix", _OF_VECTOR)
            defaults = {key: info.default for key, info in type(self).model_fields.items()}
            found += [f"model.{key}: a {own} memory has none; ignored" for key in keys
                      if getattr(self, key) != defaults[key]]
        if self.freeze_readout_steps and not (self.vector_pvm and self.learned_query):
            found.append("model.freeze_readout_steps: there is no learned query; ignored")
        if self.attention_window is not None and self.disable_attn:
            found.append("model.attention_window: model.disable_attn leaves no attention; ignored")
        return found

    def block_profile(self) -> list[dict[str, float]]:
        """Alpha, initial gamma, initial omega and phi of each block."""
        return [{"alpha": self.alpha * math.exp(-self.cascade_lambda * i), "omega": self.omega + i * self.omega_delta,
                 "gamma": self.gamma * math.exp(-self.cascade_kappa * i), "phi": i * self.phase_delta}
                for i in range(self.n_afrb)]

    def parameter_count(self) -> ParameterCount:
        """Exact count."""
        own, theirs = adapter_parameters(self), self.backbone.parameter_count(self.disabled_attention)
        return ParameterCount(total=theirs + own, trainable=own + (theirs if self.backbone.trained else 0))

    def flops_per_token(self, seq_len: int) -> float:
        """Matrix products of one forward with a readout at every token."""
        return self.backbone.flops_per_token(seq_len, attention=not self.disable_attn) + adapter_flops(self, seq_len)

    def activation_bytes_per_token(self, seq_len: int, *, element_bytes: int, checkpointing: bool,
                                   scored: int | None = None) -> float:
        """Bytes kept for the backward pass: those of frozen layers too, since gradients pass through them."""
        return activation_bytes(self, seq_len, scored or seq_len, element_bytes=element_bytes,
                                checkpointing=checkpointing)

    def with_vocab_size(self, vocab_size: int) -> AFRBConfig:
        """A copy for a tokenizer of another size."""
        return self.model_copy(update={"backbone": self.backbone.with_vocab_size(vocab_size)})

    def tiny(self) -> AFRBConfig:
        """The same parts on two narrow layers."""
        return self.model_copy(update={
            "backbone": self.backbone.tiny(), "pvm_dk": min(self.pvm_dk, 16), "pvm_dv": min(self.pvm_dv, 8),
            "pvm_content_frequencies": min(self.pvm_content_frequencies, 16)})
