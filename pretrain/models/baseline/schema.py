"""Schema of the baselines: Llama, GPT-2 and BERT at any size, with counts in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.model import ModelConfig, ParameterCount
from pretrain.config.objective import ObjectiveConfig
from pretrain.errors import ConfigError

Body = Literal["llama", "gpt2", "bert"]
_FP32_BYTES = 4
_TOKEN_TYPES = 2
"""BERT adds one of two segment vectors to each token; only the first is used, both are parameters."""


class BaselineConfig(ModelConfig):
    """A Hugging Face body of the usual kind: the control of every claim at equal parameter count."""

    changeable: ClassVar[frozenset[str]] = frozenset({"dropout", "initializer_range"})

    family: Literal["baseline"] = "baseline"
    body: Body = Field("llama", description="llama and gpt2 are causal language models, bert is an encoder")
    vocab_size_: int = Field(8192, alias="vocab_size", ge=2, le=1 << 24, description="rows of the embedding table")
    hidden_size: int = Field(256, ge=4, le=65536, description="width D; a multiple of num_heads")
    num_layers: int = Field(4, ge=1, le=1000, description="blocks")
    num_heads: int = Field(4, ge=1, le=1024, description="query heads")
    num_kv_heads: int | None = Field(None, ge=1, description="llama only: key/value heads; null: num_heads")
    intermediate_size: int | None = Field(
        None, ge=1, description="inner width of the MLP; null: 8/3 D rounded up to 64 (llama), 4 D (gpt2, bert)")
    max_position_embeddings: int = Field(2048, ge=2, le=1 << 24, description="longest input in tokens")
    rope_theta: float = Field(10000.0, gt=1, description="llama only: base of the rotary frequencies")
    tie_embeddings: bool = Field(True, description="language models: the output table is the input table")
    dropout: float = Field(0.0, ge=0, lt=1, description="llama: attention only; gpt2, bert: all their dropouts")
    norm_eps: float = Field(1e-5, gt=0, le=1e-2, description="added to the variance in normalisations")
    initializer_range: float = Field(0.02, gt=0, le=1, description="standard deviation of initial weights")

    @model_validator(mode="after")
    def _heads(self) -> BaselineConfig:
        d, heads, kv = self.hidden_size, self.num_heads, self.kv_heads
        if d % heads:
            raise ConfigError("model.num_heads", f"{heads} does not divide model.hidden_size {d}; use one of "
                              f"{_divisors_near(d, heads)}")
        if self.body != "llama" and kv != heads:
            raise ConfigError("model.num_kv_heads", f"{kv}: {self.body} has one key/value head a query head; leave it "
                              "out, or use body llama")
        if heads % kv:
            raise ConfigError("model.num_kv_heads", f"{kv} does not divide model.num_heads {heads}; use one of "
                              f"{_divisors_near(heads, kv)}")
        if self.body == "llama" and self.head_dim % 2:
            raise ConfigError("model.num_heads", f"{heads} gives heads of width {self.head_dim}, but rotary positions "
                              "turn pairs and need an even width")
        return self

    @property
    def kind(self) -> Literal["causal_lm", "encoder"]:
        """Bodies of language models predict the next token, BERT gives vectors."""
        return "encoder" if self.body == "bert" else "causal_lm"

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table (and of the output table of a language model)."""
        return self.vocab_size_

    @property
    def max_seq_len(self) -> int | None:
        """Longest input in tokens."""
        return self.max_position_embeddings

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP, resolved."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.body == "llama" else 4 * self.hidden_size

    def parameter_count(self) -> ParameterCount:
        """Exact count; tied tables once."""
        d, f, kv = self.hidden_size, self.mlp_size, self.kv_heads * self.head_dim
        tables = self.vocab_size * d
        if self.kind == "causal_lm" and not self.tie_embeddings:
            tables *= 2
        if self.body == "llama":  # matrices without biases, RMS norms without shifts
            block = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
            total = tables + self.num_layers * block + d
        else:
            norm = 2 * d
            block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * norm
            segments = _TOKEN_TYPES * d if self.body == "bert" else 0
            total = tables + self.max_position_embeddings * d + segments + self.num_layers * block + norm
        return ParameterCount(total=total, trainable=total)

    def flops_per_token(self, seq_len: int) -> float:
        """Matrix products of one forward: projections, both attention products over all T x T pairs, MLP, output."""
        d, f, kv = self.hidden_size, self.mlp_size, self.kv_heads * self.head_dim
        projections = 2 * d * d + 2 * d * kv
        mlp = (3 if self.body == "llama" else 2) * d * f
        block = 2 * (projections + mlp) + 4 * seq_len * d
        head = 2 * d * self.vocab_size if self.kind == "causal_lm" else 0
        return float(self.num_layers * block + head)

    def activation_bytes_per_token(self, seq_len: int, *, element_bytes: int, checkpointing: bool,
                                   scored: int | None = None) -> float:
        """Bytes kept for the backward pass at dropout 0; attention keeps no probabilities, so this is linear in T."""
        inside, outside = self._block_bytes(element_bytes), self._outer_bytes(seq_len, element_bytes)
        stream = self.hidden_size * element_bytes
        if checkpointing:  # the input of each block, and one block at a time while it is computed again
            return self.num_layers * stream + inside + outside
        return self.num_layers * inside + outside

    def _block_bytes(self, element_bytes: int) -> float:
        """One block, a token: inputs of products, activations and norms. Llama's norms keep an fp32 copy each."""
        d, f, kv = self.hidden_size, self.mlp_size, self.kv_heads * self.head_dim
        if self.body == "llama":
            return element_bytes * (6 * d + 2 * kv + 4 * f) + _FP32_BYTES * (2 * d + 2)
        return element_bytes * ((10 if self.body == "gpt2" else 8) * d + 2 * f + 4)

    def _outer_bytes(self, seq_len: int, element_bytes: int) -> float:
        """Around the blocks, a token: embeddings, last norm, a row of the attention mask."""
        widths = {"llama": 2, "gpt2": 2, "bert": 1}[self.body]
        norm = _FP32_BYTES * self.hidden_size if self.body == "llama" else 0
        return element_bytes * (widths * self.hidden_size + seq_len) + norm

    def objective_problems(self, objective: ObjectiveConfig) -> Iterator[ConfigError]:
        """Language models predict tokens, bert gives vectors."""
        if (objective.name == "contrastive") != (self.kind == "encoder"):
            wanted = "contrastive" if self.kind == "encoder" else "one of language models, as causal_lm"
            yield ConfigError("objective.name", f"{objective.name} does not train model.body {self.body}; use {wanted}")

    def tiny(self) -> BaselineConfig:
        """Two narrow blocks of the same body; grouped key/value heads stay grouped."""
        return self.model_copy(update={
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": self.num_kv_heads and 2,
            "intermediate_size": 64, "vocab_size_": min(self.vocab_size, 512),
            "max_position_embeddings": min(self.max_position_embeddings, 512)})


def _divisors_near(n: int, wish: int) -> str:
    """Up to five divisors of n, those nearest to `wish`, ascending."""
    divisors = sorted((k for k in range(1, n + 1) if n % k == 0), key=lambda k: abs(k - wish))[:5]
    return ", ".join(str(k) for k in sorted(divisors))
