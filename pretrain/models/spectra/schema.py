"""Schema of Spectra: a bidirectional encoder with a second, spectral attention branch and five heads.

Sections are those of the family's specification. Symbols: H hidden_size, L num_layers, I ffn_inner, s spectral_dim,
V vocabulary, P position rows, am width of the ranking head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.config.model import LOSS_CHUNK_BYTES, ModelConfig, ParameterCount
from pretrain.config.objective import MaskedLMConfig, ObjectiveConfig
from pretrain.errors import ConfigError
from pretrain.models.spectra.costs import activation_bytes_per_token, flops_per_token
from pretrain.models.spectra.sizes import COMPAT, SIZES, Size

WIDTH_MULTIPLE = 8
CLAIM_TOLERANCE = 0.05
"""A claimed size further than this from the exact one is told as a warning."""
Task = Literal["embed", "masked_lm"]
Profile = Literal["corrected", "compat"]


class SpectraConfig(ModelConfig):
    """Text-embedding model with a spectral attention branch; `task: masked_lm` is its trunk under a masked-LM head."""

    changeable: ClassVar[frozenset[str]] = frozenset({"dropout", "attention_impl", "trunk_init"})
    no_fp16: ClassVar[str | None] = "squares of its logits leave that range"

    family: Literal["spectra"] = "spectra"
    task: Task = Field("embed", description="embed: the model itself; masked_lm: its trunk with a head that predicts "
                       "hidden tokens, to warm the trunk up (see trunk_init)")
    profile: Profile = Field("corrected", description="compat: the published arithmetic, faults included, for "
                             "comparison only; sets the defaults of spectral_norm, attention_impl and decay_exclude")
    size: Size | None = Field("M456", description="sets the defaults of the six sizes below; null: all are given")
    vocab_size_: int = Field(30522, alias="vocab_size", ge=2, le=1 << 24, description="rows of the token table")
    max_positions: int = Field(512, ge=8, le=1 << 16, description="rows of the position table")
    hidden_size: int = Field(1024, ge=8, le=65536, description="width H; a multiple of num_heads")
    num_layers: int = Field(24, ge=1, le=1000, description="blocks L")
    num_heads: int = Field(16, ge=1, le=1024, description="heads of the attention branch")
    ffn_inner: int = Field(4096, ge=1, le=1 << 20, description="inner width I of the SwiGLU")
    spectral_dim: int = Field(192, ge=2, le=65536, description="width s of the spectral branch and vector")
    max_length: int = Field(160, ge=8, le=1 << 16, description="longest text in tokens; rows of the position table "
                            "beyond it are never trained, so nothing longer is taken; a multiple of 8")
    dropout: float = Field(0.1, ge=0, lt=1, description="after the embeddings, before the output projection, after "
                           "the SwiGLU")
    norm_position: Literal["post", "pre"] = Field("post", description="LayerNorm after the sum or before the branch")
    pooling: Literal["mean", "cls"] = Field("mean", description="mean over real tokens, or the first token")
    trunk_init: str = Field("scratch", description="scratch, or the run, checkpoint or export of a task masked_lm to "
                            "take the trunk from")
    use_spectral: bool = Field(True, description="false: no spectral branch, no parameters of it, no loss on it")
    spectral_norm: Literal["gate", "mean", "sum"] = Field(
        "gate", description="gate weights divided by their sum over real keys, by the number of real keys, or not")
    spectral_entropy_gate: bool = Field(False, description="scale the branch by 1 - normalised entropy of its row")
    learnable_spectral_fusion: bool = Field(True, description="false: fusion_init for good")
    fusion_init: float = Field(0.1, ge=0, le=1, description="first weight of the spectral branch")
    fusion_max: float = Field(0.5, gt=0, le=1, description="its upper bound")
    fractal_depth: int = Field(1, ge=0, le=8, description="rounds of fractal enrichment; 0: none")
    learnable_fractal: bool = Field(True, description="false: fractal_init for good")
    fractal_init: float = Field(0.02, ge=-1, le=1, description="first weight of each round")
    attention_impl: Literal["fused", "explicit"] = Field(
        "fused", description="fused: one round in a fused kernel; explicit: all logits written out, any depth")
    enable_semantic: bool = Field(True, description="head `semantic`")
    enable_entity: bool = Field(True, description="head `entity`")
    enable_anchor64: bool = Field(True, description="head `anchor`")
    sem_dims: tuple[int, ...] = Field((768, 512, 256), min_length=1, description="prefixes of the semantic vector")
    ent_dims: tuple[int, ...] = Field((384, 192, 96), min_length=1, description="prefixes of the entity vector")
    anchor_dim: int = Field(64, ge=2, le=65536, description="width of the anchor vector")
    retrieval_dim: int = Field(128, ge=2, le=65536, description="width of the retrieval vector")
    ranking_dim: int = Field(1536, ge=2, le=65536, description="width of the ranking vector")
    anomaly_basis: int = Field(16, ge=1, le=65536, description="directions that the anomaly score looks along")
    decay_exclude: bool = Field(True, description="no weight decay on biases, norms, tables, gates and the basis")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """Defaults that follow from `size`, `profile` and `fractal_depth`."""
        if not isinstance(value, Mapping):
            return value
        given = dict(value)
        size = given.get("size", "M456")
        if size is None:
            missing = sorted(set(SIZES["M456"].dimensions) - set(given))
            if missing:
                raise ConfigError(f"model.{missing[0]}", f"is missing: with model.size null all of "
                                  f"{', '.join(SIZES['M456'].dimensions)} are given")
        elif size in SIZES:
            given = {**SIZES[size].dimensions, **given}
        if given.get("profile") == "compat":
            given = {**COMPAT, **given}
        depth = given.get("fractal_depth")
        if isinstance(depth, int) and depth > 1:
            given.setdefault("attention_impl", "explicit")
        return given

    @field_validator("sem_dims", "ent_dims")
    @classmethod
    def _prefixes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(d < 2 for d in value) or list(value) != sorted(set(value), reverse=True):
            raise ValueError("widths are 2 or more and fall from the whole vector to its shortest prefix")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SpectraConfig:
        if self.hidden_size % self.num_heads:
            raise ConfigError("model.num_heads", f"{self.num_heads} does not divide model.hidden_size "
                              f"{self.hidden_size}; use one of {_divisors_near(self.hidden_size, self.num_heads)}")
        if self.max_length > self.max_positions:
            raise ConfigError("model.max_length", f"{self.max_length} is above model.max_positions "
                              f"{self.max_positions}; lower it, or raise the rows of the position table")
        if self.max_length % WIDTH_MULTIPLE:
            raise ConfigError("model.max_length", f"{self.max_length}: texts are padded to a multiple of "
                              f"{WIDTH_MULTIPLE}; use {self.max_length // WIDTH_MULTIPLE * WIDTH_MULTIPLE or 8}")
        if self.attention_impl == "fused" and (self.fractal_depth > 1 or self.profile == "compat"):
            why = f"model.fractal_depth {self.fractal_depth}" if self.fractal_depth > 1 else "model.profile compat"
            raise ConfigError("model.attention_impl", f"fused knows one corrected round and {why} is not that; "
                              "use explicit")
        if self.spectral_entropy_gate and not self.use_spectral:
            raise ConfigError("model.spectral_entropy_gate", "weighs the spectral branch, which model.use_spectral "
                              "false leaves out; set it to false, or leave the branch in")
        if self.profile == "corrected" and not 0 < self.fusion_init < self.fusion_max:
            raise ConfigError("model.fusion_init", f"{self.fusion_init} must lie between 0 and model.fusion_max "
                              f"{self.fusion_max}, both excluded")
        if self.fusion_init > self.fusion_max:
            raise ConfigError("model.fusion_init", f"{self.fusion_init} is above model.fusion_max {self.fusion_max}")
        return self

    @property
    def kind(self) -> Literal["causal_lm", "encoder"]:
        """Vectors of texts; with task masked_lm and labels, sums over the labelled tokens."""
        return "encoder"

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return self.vocab_size_

    @property
    def max_seq_len(self) -> int | None:
        """Longest text in tokens."""
        return self.max_length

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def anomalous_dim(self) -> int:
        """Width am of the ranking head's inner vector."""
        return max(1024, 2 * self.hidden_size)

    def parameter_count(self) -> ParameterCount:
        """Section 4 of the specification, with every toggle; for task masked_lm the head's in place of the five."""
        trunk = self.trunk_parameters()
        total = trunk + (sum(self.head_parameters().values()) if self.task == "embed" else self._lm_head_parameters())
        return ParameterCount(total=total, trainable=total)

    def block_parameters(self) -> int:
        """One block: attention, spectral branch, enrichment, SwiGLU, two norms."""
        h, i, s = self.hidden_size, self.ffn_inner, self.spectral_dim
        spectral = 3 * (h * s + s) + (s * h + h) + self.learnable_spectral_fusion if self.use_spectral else 0
        fractal = self.fractal_depth if self.learnable_fractal else 0
        return 4 * (h * h + h) + 2 * h + spectral + fractal + 3 * h * i + 2 * i + 3 * h

    def trunk_parameters(self) -> int:
        """Tables, blocks and last norm."""
        h = self.hidden_size
        return (self.vocab_size + self.max_positions) * h + self.num_layers * self.block_parameters() + 2 * h

    def head_parameters(self) -> dict[str, int]:
        """By head."""
        h, am, s, r = self.hidden_size, self.anomalous_dim, self.spectral_dim, self.ranking_dim
        projected = {"semantic": self.sem_dims[0] if self.enable_semantic else 0,
                     "entity": self.ent_dims[0] if self.enable_entity else 0,
                     "anchor": self.anchor_dim if self.enable_anchor64 else 0}
        counts = {name: d * h + 3 * d for name, d in projected.items() if d}
        counts["retrieval"] = h * h + h + self.retrieval_dim * h + self.retrieval_dim
        counts["ranking"] = ((2 * h * h + 2 * h) + 4 * h + (2 * h * am + am) + 2 * am + (am * s + s) + (s * s + s)
                             + 2 * s + self.anomaly_basis * am + r * (am + s) + 3 * r)
        return counts

    def _lm_head_parameters(self) -> int:
        """Transform, norm and bias; the output table is the token table."""
        return self.hidden_size**2 + 3 * self.hidden_size + self.vocab_size

    def flops_per_token(self, seq_len: int) -> float:
        """Matrix products of one forward pass over rows of `seq_len`; the heads' share a token included."""
        return flops_per_token(self, seq_len)

    def activation_bytes_per_token(self, seq_len: int, *, element_bytes: int, checkpointing: bool,
                                   scored: int | None = None) -> float:
        """Bytes kept for the backward pass, dropout masks included; linear in `seq_len` for the S x S parts."""
        return activation_bytes_per_token(self, seq_len, element_bytes=element_bytes, checkpointing=checkpointing)

    def loss_bytes(self, tokens: int, *, element_bytes: int) -> int:
        """Logits of task masked_lm and their gradient; none for vectors."""
        if self.task == "embed":
            return 0
        whole = tokens * self.vocab_size * element_bytes
        return 2 * whole if whole <= LOSS_CHUNK_BYTES else LOSS_CHUNK_BYTES

    def tiny(self) -> SpectraConfig:
        """Two narrow blocks with the same toggles."""
        return self.model_copy(update={
            "size": None, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_inner": 48, "spectral_dim": 16,
            "max_length": 64, "max_positions": 64, "vocab_size_": min(self.vocab_size, 512),
            "sem_dims": tuple(48 // 2**k for k in range(len(self.sem_dims))),
            "ent_dims": tuple(24 // 2**k for k in range(len(self.ent_dims))),
            "anchor_dim": 8, "retrieval_dim": 16, "ranking_dim": 64, "anomaly_basis": 4})

    def summary(self) -> dict[str, Any]:
        """Exact count beside the one its name claims; more than 5% between them is worth a warning."""
        figures = super().summary()
        size = SIZES.get(self.size or "")
        if size is None or self.task != "embed" or size.dimensions != {k: getattr(self, k) for k in size.dimensions}:
            return figures
        if size.claimed is not None:
            off = figures["parameters"] / size.claimed - 1
            figures["claimed_parameters"] = size.claimed
            if abs(off) > CLAIM_TOLERANCE:
                figures["warning"] = (f"size {self.size} claims {size.claimed:,} parameters, the model has "
                                      f"{figures['parameters']:,} ({off:+.1%})")
        return figures

    def objective_problems(self, objective: ObjectiveConfig) -> Iterator[ConfigError]:
        """Heads that no loss of the objective trains, and an objective of the other task."""
        wanted = "masked_lm" if self.task == "masked_lm" else "contrastive"
        if objective.name != wanted:
            yield ConfigError("objective.name", f"{objective.name} does not train model.task {self.task}; use {wanted}")
            return
        if isinstance(objective, MaskedLMConfig):
            for key in ("vocab_size", "mask_id"):
                value = getattr(objective, key)
                if value > self.vocab_size - (key == "mask_id"):
                    yield ConfigError(f"objective.{key}", f"{value} is no id of model.vocab_size {self.vocab_size}")
        if not isinstance(objective, ContrastiveConfig):
            return
        bridged = objective.enable_bridge and objective.loss_weight_bridge > 0 and self.enable_semantic \
            and self.enable_entity
        if self.enable_semantic and not objective.trains_semantic and not (bridged and not objective.bridge_stopgrad):
            yield ConfigError("model.enable_semantic", "true, but no loss trains this head: set objective."
                              "enable_semantic_nce, or model.enable_semantic=false to leave the head out")
        if self.enable_entity and objective.ent_nce_weight == 0 and not bridged:
            yield ConfigError("model.enable_entity", "true, but no loss trains this head: set objective.ent_nce_weight "
                              "or objective.enable_bridge, or model.enable_entity=false to leave the head out")
        if self.enable_anchor64 and objective.loss_weight_anchor == 0:
            yield ConfigError("model.enable_anchor64", "true, but objective.loss_weight_anchor is 0: nothing trains "
                              "this head; set one of the two")
        if self.enable_semantic and len(objective.loss_weight_sem) != len(self.sem_dims):
            yield ConfigError("objective.loss_weight_sem", f"has {len(objective.loss_weight_sem)} weights for the "
                              f"{len(self.sem_dims)} prefixes of model.sem_dims; give one for each")
        too_long = [d for d in objective.nested_dims if d > self.ranking_dim] if objective.nested_ranking else []
        if too_long:
            yield ConfigError("objective.nested_dims", f"{too_long[0]} is above model.ranking_dim {self.ranking_dim}")
        shortest = min(self.sem_dims) if self.enable_semantic else 0
        if bridged and min(self.ent_dims) > shortest:
            yield ConfigError("model.ent_dims", f"the bridge compares the shortest entity prefix, {min(self.ent_dims)} "
                              f"wide, with as many entries of the shortest semantic one, which has {shortest}")


def _divisors_near(n: int, wish: int) -> str:
    """Up to five divisors of n, those nearest to `wish`, ascending."""
    divisors = sorted((k for k in range(1, n + 1) if n % k == 0), key=lambda k: abs(k - wish))[:5]
    return ", ".join(str(k) for k in sorted(divisors))
