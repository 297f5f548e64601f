"""Tables, blocks and last norm: token ids to states (sections 3.1, 3.2 and 3.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.models.spectra.attention import FractalAttention, SpectralBranch
from pretrain.models.spectra.hf_config import SpectraHFConfig
from pretrain.models.spectra.layers import ResidualLinear, layer_norm
from pretrain.ops.documents import document_layout
from pretrain.ops.fractal import Visibility


class SwiGLU(nn.Module):
    """W3(silu(W1 x) * W2 x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.down = ResidualLinear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SpectraBlock(GradientCheckpointingLayer):
    """Attention and spectral branch side by side, then SwiGLU; norms after each sum, or before each branch."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.pre_norm = config.norm_position == "pre"
        self.attention = FractalAttention(config)
        self.spectral = SpectralBranch(config) if config.use_spectral else None
        self.attention_norm = layer_norm(h)
        self.ffn = SwiGLU(h, config.intermediate_size)
        self.ffn_norm = layer_norm(h)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x [B, S, H] -> (x, mean |w_frac|, row entropy by text [B], f); the last two None without the branch."""
        entropy = fusion = None
        inside = self.attention_norm(x) if self.pre_norm else x
        z, fractal = self.attention(inside, visibility)
        if self.spectral is not None:
            sy, entropy, fusion = self.spectral(inside, visibility)
            z = z + sy
        x = x + z if self.pre_norm else self.attention_norm(x + z)
        y = self.dropout(self.ffn(self.ffn_norm(x) if self.pre_norm else x))
        return (x + y if self.pre_norm else self.ffn_norm(x + y)), fractal, entropy, fusion


class TrunkOutput(NamedTuple):
    """States and what they tell about the branches."""

    states: Tensor
    """[B, S, H]."""
    real: Tensor
    """[B, S] bool."""
    fractal: Tensor
    """Mean |w_frac| over layers, detached."""
    entropy: Tensor | None
    """[B]: normalised entropy of the spectral weights' rows, mean over real tokens and layers, detached."""
    fusion: Tensor | None
    """Mean f over layers, detached."""


class SpectraTrunk(nn.Module):
    """What the embedding model and the masked-LM share. Its weights have the same names in both."""

    def __init__(self, config: SpectraHFConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.position_rows, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SpectraBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = layer_norm(config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                document_ids: Tensor | None = None) -> TrunkOutput:
        """Token ids to states.

        Args:
            input_ids: [B, S], S at most `max_length`.
            attention_mask: [B, S], 0 at padding.
            document_ids: [B, S], where a row holds several texts: they do not see each other, positions restart.
        """
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"input of {input_ids.shape[1]} tokens, but max_length is {longest}: positions beyond it "
                             "are not trained")
        visibility, positions = self._visibility(input_ids, attention_mask, document_ids)
        x = self.dropout(self.tokens(input_ids) + self.positions(positions))
        figures = []
        for block in self.blocks:
            x, *of_block = block(x, visibility)
            figures.append(of_block)
        fractal, entropy, fusion = (None if column[0] is None else torch.stack(column).mean(0)
                                    for column in zip(*figures, strict=True))
        real = torch.ones_like(input_ids, dtype=torch.bool) if visibility.real is None else visibility.real
        return TrunkOutput(self.norm(x), real, fractal, entropy, fusion)

    def _visibility(self, input_ids: Tensor, attention_mask: Tensor | None,
                    document_ids: Tensor | None) -> tuple[Visibility, Tensor]:
        """Who sees whom, and [S] or [B, S] positions."""
        for name, tensor in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}")
        real = None if attention_mask is None else attention_mask.bool()
        if document_ids is None:
            return Visibility(real, None), torch.arange(input_ids.shape[1], device=input_ids.device)
        layout = document_layout(document_ids, attention_mask)
        assert layout is not None
        together = layout.starts[:, :, None] == layout.starts[:, None, :]
        if real is not None:
            together = together & real[:, :, None] & real[:, None, :]
        return Visibility(real, together), layout.positions
