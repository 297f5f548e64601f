"""Spectra as Hugging Face models: the embedding model, and its trunk under a masked-LM head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init

from pretrain.models.base import EncoderOutput, LMOutput
from pretrain.models.spectra.attention import FractalAttention, SpectralBranch, first_theta
from pretrain.models.spectra.heads import RankingHead, SpectraHeads, mean_pool
from pretrain.models.spectra.hf_config import SpectraHFConfig, SpectraMLMHFConfig
from pretrain.models.spectra.layers import ResidualLinear, layer_norm
from pretrain.models.spectra.trunk import SpectraTrunk, TrunkOutput
from pretrain.ops.cross_entropy import chunked_cross_entropy

WEIGHT_STD = 0.02


class SpectraPreTrainedModel(PreTrainedModel):
    """What both models share: the trunk, and how weights begin."""

    config_class: type[SpectraHFConfig] = SpectraHFConfig
    base_model_prefix = "trunk"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("SpectraBlock",)

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__(config)
        self.trunk = SpectraTrunk(config)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.trunk.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.trunk.tokens = value

    def _init_weights(self, module: nn.Module) -> None:
        """Section 3.9: normal draws of spread 0.02, cut at two of it; the compat profile keeps torch's own defaults."""
        compat = self.config.profile == "compat"
        if isinstance(module, nn.Linear) and compat:
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            depth = 2 * self.config.num_hidden_layers if isinstance(module, ResidualLinear) else 1
            _truncated_normal(module.weight, WEIGHT_STD / math.sqrt(depth))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and compat:
            init.normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            _truncated_normal(module.weight, WEIGHT_STD)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FractalAttention) and module.w_frac is not None:
            init.constant_(module.w_frac, self.config.fractal_init)
        elif isinstance(module, SpectralBranch):
            init.constant_(module.theta, first_theta(self.config))
        elif isinstance(module, RankingHead):
            init.normal_(module.basis, std=WEIGHT_STD)


def _truncated_normal(weight: Tensor, std: float) -> None:
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _figures(trunk: TrunkOutput) -> dict[str, Tensor]:
    """What is logged about the branches; entropy and fusion only where there is a spectral branch."""
    named = {"w_frac": trunk.fractal, "attn_entropy": trunk.entropy, "fusion": trunk.fusion}
    return {name: value for name, value in named.items() if value is not None}


class SpectraModel(SpectraPreTrainedModel):
    """Texts to vectors, one text a row."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__(config)
        self.heads = SpectraHeads(config)
        self.post_init()

    @property
    def default_head(self) -> str:
        """The vector that stands for a text: the whole semantic one, else the ranking one."""
        config = self.config
        return f"semantic_{config.sem_dims[0]}" if config.enable_semantic else f"ranking_{config.ranking_dim}"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                controls: Mapping[str, float] | None = None) -> EncoderOutput:
        """Vectors of each row.

        Args:
            input_ids: [B, S], S at most `max_length`.
            attention_mask: [B, S], 0 at padding.
            controls: values of the family's hooks; Spectra has none.

        `heads` holds fp32 vectors of length 1 by HEAD_WIDTH: semantic_768, _512, _256, entity_384, _192, _96 (each
        shorter one a prefix of the whole, brought to length 1 again), anchor_64, retrieval_128, ranking_1536. `aux`:
        `anomalous` [B, am], `spectral` [B, s], `anomaly_score` [B] in (0, 0.5], `pooled` [B, H], `last_hidden_state`
        [B, S, H], and of the branches `w_frac` (mean |w|), with a spectral branch `attn_entropy` [B] and `fusion`
        (mean f).
        """
        trunk: TrunkOutput = self.trunk(input_ids, attention_mask)
        vectors, aux = self.heads(trunk.states, trunk.real)
        return EncoderOutput(heads=vectors, default=self.default_head,
                             aux={**aux, "last_hidden_state": trunk.states, **_figures(trunk)})


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, and the token table as output table with a bias of its own."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = layer_norm(config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.out_features = config.vocab_size

    def forward(self, states: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""
        return self.decoder(self.norm(F.gelu(self.transform(states))))


class SpectraForMaskedLM(SpectraPreTrainedModel):
    """The trunk of Spectra with a head that predicts hidden tokens; only the trunk goes on (`model.trunk_init`)."""

    config_class = SpectraMLMHFConfig
    _tied_weights_keys = {"head.decoder.weight": "trunk.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SpectraMLMHFConfig) -> None:
        super().__init__(config)
        self.head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output table."""
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output table."""
        self.head.decoder = new_embeddings

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, return_logits: bool = False,
                controls: Mapping[str, float] | None = None) -> LMOutput | EncoderOutput:
        """Loss sums over labelled tokens; without labels and logits, pooled states.

        Args:
            input_ids: [B, S], some of them hidden.
            labels: [B, S], the token at each hidden place, -100 elsewhere.
            document_ids: [B, S], where a row holds several texts.
            attention_mask: [B, S], 0 at padding.
            return_logits: also return logits [B, S, V].
            controls: values of the family's hooks; Spectra has none.

        Without labels and logits: head `mean` [B, H] over real tokens, `aux["token_states"]` [B, S, H].
        """
        trunk: TrunkOutput = self.trunk(input_ids, attention_mask, document_ids)
        states = trunk.states
        if labels is None and not return_logits:
            return EncoderOutput(heads={"mean": mean_pool(states, trunk.real)}, default="mean",
                                 aux={"token_states": states, **_figures(trunk)})
        output: dict[str, Any] = {}
        if labels is not None:
            sums = chunked_cross_entropy(states.flatten(0, 1), labels.flatten(), self.head)
            output = {"nll_sum": sums.nll_sum, "n_tokens": sums.n_tokens, "n_correct": sums.n_correct,
                      "terms": {"z": (sums.z_sum, sums.n_tokens)}}
        return LMOutput(**output, logits=self.head(states) if return_logits else None)


AutoConfig.register(SpectraHFConfig.model_type, SpectraHFConfig)
AutoConfig.register(SpectraMLMHFConfig.model_type, SpectraMLMHFConfig)
AutoModel.register(SpectraHFConfig, SpectraModel)
AutoModel.register(SpectraMLMHFConfig, SpectraForMaskedLM)
AutoModelForMaskedLM.register(SpectraMLMHFConfig, SpectraForMaskedLM)
