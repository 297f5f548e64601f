"""The frozen causal language model behind the adapters: layouts of its families, attention kept or taken out.

With attention it is a baseline body, so documents and padding are masked as everywhere here. Without, each layer is
h + MLP(norm(h)) (or, as the original has it, first h + norm(h) in attention's place), and no attention weight exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.models.afrb.backbone_schema import BackboneConfig, DisableAttention
from pretrain.models.afrb.phase import Tokens, pick
from pretrain.models.baseline.model import BaselineHFConfig, BaselineModel


class Layout(NamedTuple):
    """Names of the parts of a transformers model."""

    body: str
    layers: str
    attention_norm: str
    mlp_norm: str
    last_norm: str
    positions: str | None
    """Table of learned positions, added after the adapters."""


LLAMA = Layout("model", "layers", "input_layernorm", "post_attention_layernorm", "norm", None)
GPT2 = Layout("transformer", "h", "ln_1", "ln_2", "ln_f", "wpe")
LAYOUTS = {"llama": LLAMA, "mistral": LLAMA, "gpt2": GPT2, "gpt_neo": GPT2}


class OutputTable(nn.Linear):
    """The output table: hidden states [..., D] to logits [..., V], or token ids [...] to their rows [..., D].

    Rows are looked up in the forward of the module that owns them, where ZeRO-3 has the weight at hand.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Logits of floating-point input, rows of integer input."""
        return F.linear(input, self.weight) if input.is_floating_point() else F.embedding(input, self.weight)


class AttentionFreeLayer(GradientCheckpointingLayer):
    """A decoder layer without its attention, its parts under their old names."""

    def __init__(self, layer: nn.Module, layout: Layout, disabled: DisableAttention) -> None:
        super().__init__()
        self.names = layout
        self.identity = disabled == "identity"
        self.add_module(layout.mlp_norm, layer.get_submodule(layout.mlp_norm))
        self.add_module("mlp", layer.get_submodule("mlp"))
        if self.identity:
            self.add_module(layout.attention_norm, layer.get_submodule(layout.attention_norm))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], each token by itself."""
        if self.identity:
            hidden = hidden + self.get_submodule(self.names.attention_norm)(hidden)
        return hidden + self.get_submodule("mlp")(self.get_submodule(self.names.mlp_norm)(hidden))


class BackboneHFConfig(BaselineHFConfig):
    """transformers config of the backbone: the section's content under the baselines' names."""

    model_type = "afrb-backbone"

    def __init__(self, hf_config: dict[str, Any] | None = None, disabled_attention: DisableAttention | None = None,
                 document_masking: bool = True, attention_window: int | None = None, **kwargs: Any) -> None:
        self.hf_config = hf_config or {}
        self.disabled_attention = disabled_attention
        self.attention_window = attention_window
        if not hf_config:  # transformers builds empty configs to compare with
            super().__init__(**kwargs)
            return
        sizes = BackboneConfig(hf_config=hf_config).sizes
        super().__init__(
            body=sizes.body, vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.kv_heads,
            intermediate_size=sizes.mlp_size, max_position_embeddings=sizes.max_position_embeddings,
            tie_word_embeddings=sizes.tie_embeddings, document_masking=document_masking, **kwargs)

    def native(self) -> PreTrainedConfig:
        """Config of the model inside: every value of the section, without dropout and special tokens."""
        own = {"vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "n_head",
               "num_attention_heads", "num_heads", "n_positions", "max_position_embeddings", "n_inner",
               "intermediate_size", "num_key_value_heads", "model_type", "architectures", "sliding_window", "dtype",
               "torch_dtype", "transformers_version", "attention_layers", "head_dim", "use_cache"}
        kept = {key: value for key, value in self.hf_config.items() if key not in own and "drop" not in key}
        kept |= {"vocab_size": self.vocab_size, "max_position_embeddings": self.max_position_embeddings,
                 "tie_word_embeddings": self.tie_word_embeddings, "bos_token_id": None, "eos_token_id": None,
                 "pad_token_id": None, "dtype": self.dtype}
        if self.body == "llama":
            return LlamaConfig(**kept, hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers,
                               num_attention_heads=self.num_attention_heads, intermediate_size=self.intermediate_size,
                               num_key_value_heads=self.num_key_value_heads)
        if kept.get("activation_function", "gelu_new") == "gelu_new":
            kept["activation_function"] = "gelu_pytorch_tanh"  # the same function as one kernel
        if self.hf_config["model_type"] == "gpt2":
            return GPT2Config(**kept, n_embd=self.hidden_size, n_layer=self.num_hidden_layers,
                              n_head=self.num_attention_heads, n_inner=self.intermediate_size, resid_pdrop=0.0,
                              embd_pdrop=0.0, attn_pdrop=0.0)
        kept.setdefault("attention_types", [[["global", "local"], self.num_hidden_layers // 2]])
        return GPTNeoConfig(**kept, hidden_size=self.hidden_size, num_layers=self.num_hidden_layers,
                            num_heads=self.num_attention_heads, intermediate_size=self.intermediate_size)


class Backbone(BaselineModel):
    """Layers, final norm and tables of a causal language model."""

    config_class = BackboneHFConfig  # type: ignore[assignment]

    def _build_native(self, config: PreTrainedConfig) -> PreTrainedModel:
        if self.config.hf_config["model_type"] == "gpt_neo":  # it has attention written out only
            config._attn_implementation = "eager"
        cls = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "gpt_neo": GPTNeoForCausalLM}[config.model_type]
        native = cls(config)
        native.lm_head.__class__ = OutputTable  # the same layout, and ties to the input table stay as they are
        self.layout = LAYOUTS[self.config.hf_config["model_type"]]
        disabled = self.config.disabled_attention
        if disabled is not None:
            layers = native.get_submodule(f"{self.layout.body}.{self.layout.layers}")
            for index in range(len(layers)):
                layers[index] = AttentionFreeLayer(layers[index], self.layout, disabled)
        return native

    @property
    def attends(self) -> bool:
        """Whether attention is kept."""
        return self.config.disabled_attention is None

    def get_output_embeddings(self) -> OutputTable:
        """The output table."""
        table: OutputTable = self.native.lm_head
        return table

    def forward(self, embeds: Tensor, tokens: Tokens, document_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, cache: Any | None = None, use_cache: bool = False,
                rows: Tensor | None = None) -> tuple[Tensor, Any | None]:
        """(hidden states after the final norm [B, T, D], key/value cache where attention is kept and one is asked for).

        `document_ids` and `attention_mask` are as in `token_layout`; `cache` is that of the call before. With `rows`
        [B, R] the states of these tokens alone, [B, R, D]: without attention no others are computed.
        """
        body = self.native.get_submodule(self.layout.body)
        if self.attends:
            masking = self._masking(embeds[..., 0], document_ids, attention_mask, causal=True, past=tokens.past,
                                    window=self.config.attention_window)
            out = body(inputs_embeds=embeds, past_key_values=cache, use_cache=use_cache, **self._given(masking))
            hidden = out.last_hidden_state if rows is None else pick(out.last_hidden_state, rows)
            return hidden, out.past_key_values if use_cache else None
        hidden = embeds
        if self.layout.positions is not None:
            hidden = hidden + body.get_submodule(self.layout.positions)(self._positions(tokens, embeds.shape[1]))
        if rows is not None:
            hidden = pick(hidden, rows)
        for layer in body.get_submodule(self.layout.layers):
            hidden = layer(hidden)
        return body.get_submodule(self.layout.last_norm)(hidden), None

    def _given(self, masking: Any) -> dict[str, Any]:
        """Arguments of the body; GPT-Neo knows no blocks of queries."""
        given: dict[str, Any] = masking._asdict()
        if self.config.hf_config["model_type"] == "gpt_neo":
            del given["attention_blocks"]
        return given

    def _positions(self, tokens: Tokens, length: int) -> Tensor:
        total = tokens.past + length
        if total > self.config.max_position_embeddings:
            raise ValueError(f"input of {total} tokens, but the backbone has {self.config.max_position_embeddings} "
                             "positions")
        return tokens.positions


def freeze(backbone: nn.Module) -> None:
    """No gradient for any of its weights; gradients still pass through."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)


@torch.no_grad()
def table_rows(table: nn.Module, size: int, device: torch.device, block: int = 8192) -> Iterator[Tensor]:
    """[V, D] fp32 of an embedding or an output table, block by block of rows, looked up by calling it."""
    for ids in torch.arange(size, device=device).split(block):
        yield table(ids).float()
