"""Encoders of transformers, and of sentence-transformers' folders, behind our forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.errors import UserError
from pretrain.models.base import EncoderOutput

MODULES = "modules.json"
"""Written by sentence-transformers: the parts of a text encoder, in order."""
MAX_LENGTH = "sentence_bert_config.json"
"""Tokens a text, in the same folders."""
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class PlainEncoder(nn.Module):
    """Heads `mean` (over real tokens) and `cls` (the first token) of a model that returns hidden states."""

    def __init__(self, native: PreTrainedModel, pooling: str = "mean") -> None:
        super().__init__()
        self.native = native
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor,
                controls: Mapping[str, float] | None = None) -> EncoderOutput:
        """[B, T] ids and mask -> heads [B, d] in fp32."""
        states = self.native(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state.float()
        weights = attention_mask.float()[..., None]
        return EncoderOutput(heads={"mean": (states * weights).sum(1) / weights.sum(1).clamp_min(1e-9),
                                    "cls": states[:, 0]}, default=self.pooling)


def is_encoder_folder(folder: Path, architectures: list[str] | None) -> bool:
    """Whether a folder of transformers or sentence-transformers holds an encoder of texts."""
    if (folder / MODULES).is_file():
        return True
    return bool(architectures) and not any("LM" in name or "CausalLM" in name for name in architectures or [])


def pooling_of(folder: Path) -> str:
    """How a sentence-transformers folder pools; `mean` where nothing is said. Raises UserError for other ways."""
    if not (folder / MODULES).is_file():
        return "mean"
    for module in json.loads((folder / MODULES).read_bytes()):
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Pooling":
            stated = json.loads((folder / module["path"] / "config.json").read_bytes())
            modes = [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
            if "pooling_mode" in stated:
                modes = [f"pooling_mode_{stated['pooling_mode']}"]
            known = {**_POOLING, "pooling_mode_mean": "mean", "pooling_mode_cls": "cls"}
            if len(modes) != 1 or modes[0] not in known:
                raise UserError(f"{folder / module['path']}: pools by {', '.join(modes) or 'nothing'}; mean or the "
                                "first token are known here")
            return known[modes[0]]
        if kind == "TextEncoder":  # ours, around a model of transformers: the head is the pooling
            return str(json.loads((folder / module["path"] / "encoder.json").read_bytes())["head"])
        if kind not in ("Transformer", "Normalize"):
            raise UserError(f"{folder}: has a module {kind} after its transformer, which is not known here")
    return "mean"


def max_length_of(folder: Path) -> int | None:
    """Tokens a text that a sentence-transformers folder was made for; None where nothing is said."""
    path = folder / MAX_LENGTH
    value = json.loads(path.read_bytes()).get("max_seq_length") if path.is_file() else None
    return int(value) if value else None
