"""Llama, GPT-2 and BERT from transformers behind one masking wrapper.

Called as they are, these models let documents of a window see each other unless several arguments are set just so.
Here one function decides positions and mask for all three, from document ids and padding; padding is a document of its
own. On CPU attention goes through `pretrain.ops.attention`, elsewhere through torch's kernels, which get no mask at all
where there is one document a row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pretrain.models.base import EncoderOutput, LMOutput
from pretrain.models.baseline.schema import BaselineConfig
from pretrain.ops.attention import QUERY_BLOCK, blocked_attention
from pretrain.ops.cross_entropy import chunked_cross_entropy
from pretrain.ops.documents import DocumentLayout, QueryBlock, attention_bias, document_layout, query_blocks

ATTENTION = "document_attention"
"""Name of our attention among those of transformers."""


class BaselineHFConfig(PreTrainedConfig):
    """`config.json` of a baseline language model: the schema's values under transformers' names."""

    model_type = "baseline"

    def __init__(self, body: str = "llama", vocab_size: int = 8192, hidden_size: int = 256, num_hidden_layers: int = 4,
                 num_attention_heads: int = 4, num_key_value_heads: int | None = None, intermediate_size: int = 704,
                 max_position_embeddings: int = 2048, rope_theta: float = 10000.0, tie_word_embeddings: bool = True,
                 dropout: float = 0.0, norm_eps: float = 1e-5, initializer_range: float = 0.02,
                 document_masking: bool = True, **kwargs: Any) -> None:
        self.body = body
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.tie_word_embeddings = tie_word_embeddings
        self.dropout = dropout
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.document_masking = document_masking
        super().__init__(**kwargs)

    def native(self) -> PreTrainedConfig:
        """The config of the transformers model inside, without special tokens (they belong to the tokenizer)."""
        shared = {
            "vocab_size": self.vocab_size, "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range, "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": self.dtype,
        }
        if self.body == "gpt2":
            # The activation is GPT-2's own, as one kernel that keeps two tensors of the MLP's width instead of five.
            return GPT2Config(
                n_embd=self.hidden_size, n_layer=self.num_hidden_layers, n_head=self.num_attention_heads,
                n_inner=self.intermediate_size, layer_norm_epsilon=self.norm_eps, resid_pdrop=self.dropout,
                embd_pdrop=self.dropout, attn_pdrop=self.dropout, activation_function="gelu_pytorch_tanh", **shared)
        sizes = {"hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers,
                 "num_attention_heads": self.num_attention_heads, "intermediate_size": self.intermediate_size}
        if self.body == "bert":
            return BertConfig(hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
                              layer_norm_eps=self.norm_eps, use_cache=False, **sizes, **shared)
        return LlamaConfig(num_key_value_heads=self.num_key_value_heads, rms_norm_eps=self.norm_eps,
                           attention_dropout=self.dropout, **sizes, **shared,
                           rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta})


class BaselineEncoderHFConfig(BaselineHFConfig):
    """`config.json` of a baseline encoder; a type of its own, so that `AutoModel` finds the right class."""

    model_type = "baseline-encoder"


def hf_config(cfg: BaselineConfig, *, document_masking: bool = True) -> BaselineHFConfig:
    """The transformers config of a schema."""
    cls = BaselineEncoderHFConfig if cfg.kind == "encoder" else BaselineHFConfig
    return cls(
        body=cfg.body, vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.kv_heads, intermediate_size=cfg.mlp_size,
        max_position_embeddings=cfg.max_position_embeddings, rope_theta=cfg.rope_theta,
        tie_word_embeddings=cfg.tie_embeddings, dropout=cfg.dropout, norm_eps=cfg.norm_eps,
        initializer_range=cfg.initializer_range, document_masking=document_masking)


def document_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                       dropout: float = 0.0, scaling: float | None = None,
                       attention_blocks: list[QueryBlock] | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention in transformers' interface: [B, H, T, d] in, [B, T, H, d] out.

    Runs blocked where the wrapper has cut blocks, except with attention dropout, which torch's kernel knows.
    """
    if attention_blocks is None or attention_mask is None or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_attention(query, key, value, attention_mask, attention_blocks, scale), None


class _Masking(NamedTuple):
    """Arguments of a transformers body that keep documents apart."""

    position_ids: Tensor | None
    attention_mask: Tensor | None
    attention_blocks: list[QueryBlock] | None


class BaselineModel(PreTrainedModel):
    """What language model and encoder share: the transformers model inside, and the masking in front of it."""

    config_class = BaselineHFConfig
    base_model_prefix = "native"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    native: PreTrainedModel

    def __init__(self, config: BaselineHFConfig) -> None:
        super().__init__(config)
        native = config.native()
        native._attn_implementation = ATTENTION if self.config._attn_implementation == "sdpa" else "eager"
        self.native = self._build_native(native)
        self.post_init()

    def _build_native(self, config: PreTrainedConfig) -> PreTrainedModel:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.native.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.native.set_input_embeddings(value)

    def _masking(self, input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None, *, causal: bool,
                 past: int = 0, window: int | None = None) -> _Masking:
        """Positions and mask for the last T of `past + T` tokens; ids and mask cover all of them.

        With a `window` each token sees that many, itself included.
        """
        length, total = input_ids.shape[1], past + input_ids.shape[1]
        if total > self.config.max_position_embeddings:
            raise ValueError(f"input of {total} tokens, but max_position_embeddings is "
                             f"{self.config.max_position_embeddings}")
        for name, tensor in (("document_ids", document_ids), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != (input_ids.shape[0], total):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but there are {input_ids.shape[0]} rows of "
                                 f"{total} tokens, {past} of them in the cache")
        layout = document_layout(document_ids if self.config.document_masking else None, attention_mask)
        if layout is not None and _is_one_document(layout):
            layout = None
        if window is not None and window >= total:
            window = None
        device, eager = input_ids.device, self.native.config._attn_implementation == "eager"
        blocked = device.type == "cpu" and not past and not eager and not torch.compiler.is_compiling()
        kernel_masks = layout is None and window is None and (not causal or not past or length == 1)
        bias = None
        if blocked or not kernel_masks or (eager and causal):
            bias = attention_bias(layout, length, total, causal=causal, dtype=self.dtype, device=device, window=window)
        blocks = query_blocks(layout, length, causal=causal, size=QUERY_BLOCK, window=window) if blocked else None
        positions = None if layout is None else layout.positions[:, past:]
        return _Masking(positions, bias, blocks)


def _is_one_document(layout: DocumentLayout) -> bool:
    """Whether no row has a boundary. Decided on values, so not where they cannot be read (meta, tracing)."""
    if layout.starts.is_meta or torch.compiler.is_compiling():
        return False
    return not bool(layout.starts.any())


class BaselineForCausalLM(BaselineModel, GenerationMixin):
    """Llama or GPT-2 body with one forward that returns sums over tokens."""

    def _build_native(self, config: PreTrainedConfig) -> PreTrainedModel:
        return GPT2LMHeadModel(config) if self.config.body == "gpt2" else LlamaForCausalLM(config)

    def get_output_embeddings(self) -> nn.Module:
        """The output table."""
        return self.native.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output table."""
        self.native.lm_head = new_embeddings

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, past_key_values: Any | None = None, use_cache: bool = False,
                return_logits: bool = False, logits_to_keep: int = 0,
                controls: Mapping[str, float] | None = None, return_dict: bool = True) -> LMOutput:
        """Hidden states, then loss sums or logits.

        Args:
            input_ids: [B, T].
            labels: [B, T], already shifted by the collator, -100 where a position has none.
            document_ids: [B, T], with a cache [B, past + T]; see `pretrain.ops.documents`.
            attention_mask: like `document_ids`, 0 at padding.
            past_key_values, use_cache: state for decoding; with `use_cache` it comes back in the output.
            return_logits: also return logits [B, T, V]; `logits_to_keep` > 0 limits them to the last positions.
            controls: values of the family's hooks; the baselines have none.
            return_dict: as transformers' generation passes it; the output is always an `LMOutput`.

        `terms["z"]` is the sum of squared log-normalisers, for the z-loss.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("static caches are not supported; use the default, dynamic one")
        masking = self._masking(input_ids, document_ids, attention_mask, causal=True, past=past)
        body = self.native.transformer if self.config.body == "gpt2" else self.native.model
        state = body(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **masking._asdict())
        hidden = state.last_hidden_state
        output = LMOutput(past_key_values=state.past_key_values if use_cache else None)
        if labels is not None:
            sums = chunked_cross_entropy(hidden.flatten(0, 1), labels.flatten(), self.native.lm_head)
            output = LMOutput(nll_sum=sums.nll_sum, n_tokens=sums.n_tokens, n_correct=sums.n_correct,
                              terms={"z": (sums.z_sum, sums.n_tokens)}, past_key_values=output.past_key_values)
        if return_logits:
            output["logits"] = self.native.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What transformers prepares, with logits asked for; positions follow from the mask."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return {**inputs, "return_logits": True}


class BaselineEncoder(BaselineModel):
    """BERT body; heads `mean` (default) and `cls`."""

    config_class = BaselineEncoderHFConfig

    def _build_native(self, config: PreTrainedConfig) -> PreTrainedModel:
        return BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None,
                controls: Mapping[str, float] | None = None) -> EncoderOutput:
        """Vectors of each row.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 at padding.
            document_ids: [B, T], where a row holds several texts; heads then pool over all of them.
            controls: values of the family's hooks; the baselines have none.

        `heads["mean"]` [B, D] is the mean over real tokens (zero for a row without any), `heads["cls"]` [B, D] the
        first real token, `aux["token_states"]` [B, T, D] the states themselves.
        """
        masking = self._masking(input_ids, document_ids, attention_mask, causal=False)
        states = self.native(input_ids=input_ids, **masking._asdict()).last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = real.to(torch.float32)[..., None]
        mean = (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
        first = states[torch.arange(len(states), device=states.device), real.int().argmax(1)]
        return EncoderOutput(heads={"mean": mean.to(states.dtype), "cls": first}, default="mean",
                             aux={"token_states": states})


def native_model(model: BaselineModel) -> PreTrainedModel:
    """The plain transformers model on the same weights (shared, not copied), for export."""
    tensors = [*model.native.parameters(), *model.native.buffers()]
    native = copy.deepcopy(model.native, memo={id(tensor): tensor for tensor in tensors})
    native.set_attn_implementation("sdpa")
    return native


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, document_attention)
AutoConfig.register(BaselineHFConfig.model_type, BaselineHFConfig)
AutoConfig.register(BaselineEncoderHFConfig.model_type, BaselineEncoderHFConfig)
AutoModel.register(BaselineHFConfig, BaselineForCausalLM)
AutoModel.register(BaselineEncoderHFConfig, BaselineEncoder)
AutoModelForCausalLM.register(BaselineHFConfig, BaselineForCausalLM)
