"""What an export of an encoder has beside weights, config and tokenizer: how texts become its vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from evaluation.embedding import Cut
from evaluation.embedding_eval import tokens_of
from evaluation.plain_encoder import MAX_LENGTH, MODULES
from evaluation.target import Target, open_target
from pretrain.config.suggest import nearest
from pretrain.errors import UserError
from pretrain.runfolder.publish import write_text_atomic

ENCODER_CONFIG = "encoder.json"
"""Which vector of the model stands for a text: {head, dim}."""
SENTENCE_CONFIG = "config_sentence_transformers.json"
SENTENCE_FILES = (ENCODER_CONFIG, SENTENCE_CONFIG, MODULES, MAX_LENGTH)
MODULE = "evaluation.sentence_module.TextEncoder"
HEAD = "head."
"""Prefix of the vectors in a file of reference."""
PROBE_ROWS, PROBE_TOKENS = 4, 64


@dataclass(frozen=True, slots=True)
class Probe:
    """Stored texts of a checkpoint and the vectors of every head on them: what an export must reproduce."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    heads: dict[str, torch.Tensor]
    """[n, d] fp32 by name."""
    default: str

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target) -> Probe:
        """Of a target that is a checkpoint."""
        assert target.checkpoint is not None
        stored = load_file(target.checkpoint.path / "probe.safetensors")
        ids = stored["input_ids"][:PROBE_ROWS, :PROBE_TOKENS].contiguous()
        mask = stored.get("attention_mask", torch.ones_like(stored["input_ids"], dtype=torch.bool))
        mask = mask[:PROBE_ROWS, :PROBE_TOKENS].bool().contiguous()
        output = target.forward(input_ids=ids, attention_mask=mask)
        return cls(ids, mask, {name: v.float().contiguous() for name, v in output.heads.items()}, output.default)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the fresh process reads them."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask,
                **{HEAD + name: vectors for name, vectors in self.heads.items()}}

    def cut(self, stated: str | None) -> Cut:
        """The vector that stands for a text: `HEAD`, `HEAD:DIM` or `:DIM`, else the model's default one.

        Raises UserError for a head, or a number of coordinates, that the model does not have.
        """
        cut = Cut.parse(stated or "")
        name = cut.head or self.default
        if name not in self.heads:
            raise UserError(f'head "{name}": the model has no such head{nearest(name, self.heads)}; it has '
                            f"{', '.join(sorted(self.heads))}")
        if cut.dim is not None and not 1 <= cut.dim <= self.heads[name].shape[1]:
            raise UserError(f"--head {stated}: {name} has {self.heads[name].shape[1]} coordinates")
        return Cut(name, cut.dim)


def vectors_differ_by(folder: str, stored: Mapping[str, torch.Tensor], dtype: str) -> float:
    """Largest difference of a coordinate over the largest stored one, of all heads; infinite where one is missing or
    not finite."""
    target = open_target(folder, dtype=dtype, device=torch.device("cpu"))
    with torch.no_grad():
        found = target.forward(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"]).heads
    largest = 0.0
    for name, want in stored.items():
        if name.startswith(HEAD):
            have = found.get(name.removeprefix(HEAD))
            if have is None or have.shape != want.shape or not bool(torch.isfinite(have).all()):
                return float("inf")
            largest = max(largest, float((have.float() - want).abs().max() / want.abs().max()))
    return largest


def write_sentence_files(target: Target, cut: Cut, folder: Path) -> dict[str, Any]:
    """The files that sentence-transformers opens a folder by; none where there is no tokenizer.

    Returns what provenance says of them.
    """
    if target.tokenizer is None:
        return {"head": cut.head, "dim": cut.dim, "max_length": None}
    length = tokens_of(target).max_length
    written: dict[str, Any] = {
        MODULES: [{"idx": 0, "name": "0", "path": "", "type": MODULE}],
        MAX_LENGTH: {"max_seq_length": length},
        ENCODER_CONFIG: {"head": cut.head, "dim": cut.dim},
        SENTENCE_CONFIG: {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None,
                          "similarity_fn_name": "cosine"},
    }
    for name, content in written.items():
        write_text_atomic(folder / name, json.dumps(content, indent=1) + "\n")
    return {"head": cut.head, "dim": cut.dim, "max_length": length}
