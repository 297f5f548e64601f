"""The frozen causal language model of AFRB as a config section: which architecture, where its weights are, its size."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from pretrain.config.model import Section
from pretrain.config.suggest import nearest
from pretrain.errors import ConfigError
from pretrain.models.baseline.schema import BaselineConfig

Architecture = Literal["llama", "mistral", "gpt2", "gpt_neo"]
DisableAttention = Literal["zero", "identity"]
_KEY = "model.backbone.hf_config"
_ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",), "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "intermediate_size": ("intermediate_size", "n_inner"), "num_key_value_heads": ("num_key_value_heads",),
}
"""Names that transformers' configs use for the same thing."""
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_KNOWN = ("gpt2", "gpt_neo", "llama", "mistral")
_MISTRAL_WINDOW = 4096
"""What transformers takes where a Mistral's config.json names none."""


class AttentionFree(NamedTuple):
    """Parameters that go with attention, a layer."""

    attention: int
    norm: int
    """The norm in front of it; kept where the sublayer is replaced by the identity."""


class BackboneConfig(Section):
    """The causal language model that the adapters stand in. Its dropouts are off."""

    architectures: ClassVar[tuple[str, ...]] = _KNOWN

    hf_config: dict[str, Any] = Field(description="config.json of the model as transformers writes it: model_type "
                                      "(llama, mistral, gpt2 or gpt_neo) and sizes")
    weights: str | None = Field(None, description="folder with its safetensors: an export of this stack or a local "
                                "Hugging Face folder; null: fresh weights from the seed")
    trained: bool = Field(False, description="train it along with the adapters; a matrix memory's tables are whitened "
                          "as they are before the first step, so retrieval may be lost as they move")

    @model_validator(mode="after")
    def _checked(self) -> BackboneConfig:
        kind = self.hf_config.get("model_type")
        if kind == "bert":
            raise ConfigError(_KEY, "model_type bert sees tokens on both sides and predicts no next one; use one of "
                              f"{', '.join(_KNOWN)}")
        if kind not in _KNOWN:
            raise ConfigError(_KEY, f"model_type {kind} is not known{nearest(str(kind), _KNOWN)}; use one of "
                              f"{', '.join(_KNOWN)}")
        for name in _REQUIRED if self.body == "gpt2" else (*_REQUIRED, "intermediate_size"):
            if self._get(name) is None:
                raise ConfigError(_KEY, f"{name} is missing; take the sizes from the model's config.json")
        if kind in ("llama", "mistral"):
            self._check_llama()
        try:
            self.sizes  # noqa: B018
        except (ValidationError, ConfigError) as error:
            raise ConfigError(_KEY, f"describes no {kind} model: {_first_line(error)}") from None
        return self

    def _check_llama(self) -> None:
        for name in ("attention_bias", "mlp_bias"):
            if self.hf_config.get(name):
                raise ConfigError(_KEY, f"{name} true: biases of a {self.architecture} model are not supported")
        head_dim, heads = self.hf_config.get("head_dim"), self._get("num_attention_heads")
        if head_dim is not None and head_dim * heads != self._get("hidden_size"):
            raise ConfigError(_KEY, f"head_dim {head_dim} x {heads} heads is not hidden_size "
                              f"{self._get('hidden_size')}; such models are not supported")

    def _get(self, name: str) -> Any:
        return next((self.hf_config[key] for key in _ALIASES[name] if self.hf_config.get(key) is not None), None)

    @property
    def architecture(self) -> Architecture:
        """transformers' model_type."""
        kind: Architecture = self.hf_config["model_type"]
        return kind

    @property
    def body(self) -> Literal["llama", "gpt2"]:
        """Layout of the weights: Mistral is Llama's; GPT-Neo's differs from GPT-2's inside attention only."""
        return "llama" if self.architecture in ("llama", "mistral") else "gpt2"

    @property
    def sizes(self) -> BaselineConfig:
        """The baseline of the same sizes, whose closed forms are used."""
        values = {"vocab_size": self._get("vocab_size"), "hidden_size": self._get("hidden_size"),
                  "num_layers": self._get("num_hidden_layers"), "num_heads": self._get("num_attention_heads"),
                  "max_position_embeddings": self._get("max_position_embeddings"),
                  "intermediate_size": self._get("intermediate_size"),
                  "tie_embeddings": self.hf_config.get("tie_word_embeddings", self.body == "gpt2")}
        if self.body == "llama":
            values["num_kv_heads"] = self._get("num_key_value_heads")
        return BaselineConfig(body=self.body, **values)

    @property
    def attention_window(self) -> int | None:
        """Tokens that each token of the model attends to, itself included; None: all before it."""
        if self.architecture != "mistral":
            return None
        window: int | None = self.hf_config.get("sliding_window", _MISTRAL_WINDOW)
        return window

    def attention_parameters(self) -> AttentionFree:
        """Parameters of one layer's attention and of the norm in front of it."""
        sizes = self.sizes
        d, kv = sizes.hidden_size, sizes.kv_heads * sizes.head_dim
        if self.body == "llama":
            return AttentionFree(2 * d * d + 2 * d * kv, d)
        biases = d if self.architecture == "gpt_neo" else 4 * d
        return AttentionFree(4 * d * d + biases, 2 * d)

    def parameter_count(self, disabled: DisableAttention | None) -> int:
        """Exact count; `disabled` attention takes its weights along, and in mode zero the norm in front of it."""
        sizes = self.sizes
        total = sizes.parameter_count().total
        if self.architecture == "gpt_neo":
            total -= 3 * sizes.hidden_size * sizes.num_layers
        if disabled is not None:
            attention, norm = self.attention_parameters()
            total -= sizes.num_layers * (attention + (norm if disabled == "zero" else 0))
        return total

    def flops_per_token(self, seq_len: int, *, attention: bool) -> float:
        """Matrix products of layers and output table, forward; see `BaselineConfig.flops_per_token`."""
        sizes = self.sizes
        total = sizes.flops_per_token(seq_len)
        if not attention:
            d, kv = sizes.hidden_size, sizes.kv_heads * sizes.head_dim
            total -= sizes.num_layers * (2 * (2 * d * d + 2 * d * kv) + 4 * seq_len * d)
        return total

    def with_vocab_size(self, vocab_size: int) -> BackboneConfig:
        """A copy for a tokenizer of another size."""
        return self.model_copy(update={"hf_config": {**self.hf_config, "vocab_size": vocab_size}})

    def tiny(self) -> BackboneConfig:
        """Two narrow layers of the same architecture, with fresh weights."""
        sizes = self.sizes.tiny()
        values: dict[str, Any] = {
            "vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size, "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads, "max_position_embeddings": sizes.max_position_embeddings,
            "intermediate_size": sizes.mlp_size}
        if self.body == "llama":
            values["num_key_value_heads"] = sizes.kv_heads
        own = {name: key for key, names in _ALIASES.items() for name in names if name in self.hf_config}
        kept = {key: value for key, value in self.hf_config.items() if key not in own and key != "head_dim"}
        if self.architecture == "gpt_neo":
            kept["attention_types"] = [[["global", "local"], 1]]
        return BackboneConfig(hf_config={**kept, **values}, weights=None)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
