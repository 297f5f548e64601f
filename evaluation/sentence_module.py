"""An export of an encoder as a module of sentence-transformers, which `modules.json` of the export names.

Imported by sentence-transformers itself, where it is installed: `SentenceTransformer(FOLDER, trust_remote_code=True)`.
The flag is asked for because the class is none of that library's own; what runs is this installed package, as the
folder holds no code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule

from data_prep.manifest import TOKENIZER
from data_prep.tokenizer import TOKENIZER_CONFIG
from evaluation.embedding import Cut
from evaluation.embedding_eval import tokens_of
from evaluation.encoder_export import ENCODER_CONFIG, SENTENCE_FILES
from evaluation.target import PROVENANCE, Target, open_target
from evaluation.vectors import pad, shorten
from pretrain.config.suggest import nearest
from pretrain.errors import UserError


class TextEncoder(InputModule):
    """Texts to the unit vectors of one head, as `pretrain embed` gives them."""

    config_file_name = ENCODER_CONFIG

    def __init__(self, target: Target, cut: Cut, max_length: int | None = None) -> None:
        """Raises UserError where the target has no tokenizer or no such head."""
        super().__init__()
        self.target, self.cut = target, cut
        self.encoder = target.module
        self.tokens = tokens_of(target, max_length)
        self.tokenizer = self.tokens.tokenizer
        self.max_seq_length = self.tokens.max_length
        heads = self._heads(**self._tensors([""]))
        name = self.cut.head
        if name is None or name not in heads:
            raise UserError(f'head "{name}": the model has no such head{nearest(str(name), heads)}')
        self._width = shorten(heads[name], cut.dim).shape[1]

    def _tensors(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        room = self.max_seq_length - len(self.tokens.prefix) - len(self.tokens.suffix)
        ids, mask = pad([row if len(row) <= self.max_seq_length else
                         [*row[:len(self.tokens.prefix) + room], *self.tokens.suffix]
                         for row in self.tokens(texts)], self.tokens.pad_id)
        return {"input_ids": ids, "attention_mask": mask}

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Ids and mask [n, longest] of texts, each with `prompt` before it. Raises UserError for other inputs."""
        if not all(isinstance(text, str) for text in inputs):
            raise UserError("this encoder takes texts; pairs, images and the like are not known to it")
        return self._tensors([(prompt or "") + text for text in inputs])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [n, d], fp32 and of length 1."""
        assert self.cut.head is not None
        vectors = self._heads(features["input_ids"], features["attention_mask"])[self.cut.head]
        features["sentence_embedding"] = shorten(vectors, self.cut.dim)
        return features

    def _heads(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Mapping[str, torch.Tensor]:
        controls = dict(self.target.controls)
        with torch.set_grad_enabled(torch.is_grad_enabled() and hasattr(self, "_width")):
            output = self.encoder(input_ids=input_ids, attention_mask=attention_mask,
                                  **({"controls": controls} if controls else {}))
        heads: Mapping[str, torch.Tensor] = output.heads
        return heads

    def get_embedding_dimension(self) -> int:
        """Coordinates of a vector."""
        return self._width

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the weights as they are now, beside the other files of the export; without its statement of origin,
        whose hashes they may no longer fit."""
        out = Path(output_path)
        self.target.model.save_pretrained(out)
        for name in (TOKENIZER, TOKENIZER_CONFIG, *SENTENCE_FILES):
            if (self.target.path / name).is_file():
                shutil.copyfile(self.target.path / name, out / name)
        (out / PROVENANCE).unlink(missing_ok=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", token: bool | str | None = None,
             cache_folder: str | None = None, revision: str | None = None, local_files_only: bool = False,
             init_defaults: dict[str, Any] | None = None, **kwargs: Any) -> TextEncoder:
        """Open an export. Raises UserError, and DataCorruption where a file is not the one that was exported."""
        folder = Path(cls.load_dir_path(model_name_or_path, subfolder=subfolder, token=token,
                                        cache_folder=cache_folder, revision=revision,
                                        local_files_only=local_files_only) or "")
        stated = json.loads((folder / ENCODER_CONFIG).read_bytes())
        wanted = (kwargs.get("model_kwargs") or {}).get("dtype", torch.float32)
        dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        if wanted not in dtypes:
            raise UserError(f"dtype {wanted}: torch.float32, torch.bfloat16 or torch.float16 would be right")
        target = open_target(str(folder), dtype=dtypes[wanted], device=torch.device("cpu"))
        return cls(target, Cut(stated["head"], stated["dim"]))
