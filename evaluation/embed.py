"""Many texts to vectors in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.reading import format_of
from evaluation.embedding_eval import Encoder
from evaluation.tabular import lists, objects, opened
from evaluation.vectors import Alone, encode, shorten
from pretrain.config.suggest import nearest
from pretrain.errors import UserError


@dataclass(frozen=True, slots=True)
class _Shared(Alone):
    """One of several processes with the same model."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def embed_texts(encoder: Encoder, texts: Sequence[str], head: str | None, dim: int | None,
                place: tuple[int, int]) -> tuple[str, torch.Tensor]:
    """(name of the head, unit vectors fp32 [n, d] on every rank), in the order of `texts`. Collective.

    `place` is (rank, world). Raises UserError for a head or dimension that the model does not have, and for no texts.
    """
    if not texts:
        raise UserError("there is no text to embed")
    rank, world = place
    view = _Shared(encoder.target.forward, encoder.target.device, rank, world)
    rows = encoder.tokens(texts)
    with Progress(TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  disable=rank > 0, transient=True) as bar:
        task = bar.add_task("", total=-(-len(rows) // world))
        found = encode(view, rows, pad_id=encoder.tokens.pad_id, heads=None if head is None else [head],
                       batch_size=encoder.batch_size, progress=lambda n: bar.advance(task, n))
    name, vectors = next(iter(found.items()))
    return name, shorten(vectors, dim).cpu()


def read_texts(path: Path, column: str) -> list[str]:
    """Texts of a file: lines of .txt, else a column of .csv, .tsv, .jsonl (plain, .gz, .zst) or .parquet.

    Text i is line or row i: none is left out. Raises UserError naming file, line and column.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    kind = format_of(path)
    if kind == ".txt":
        with opened(path, newline=None) as stream:
            lines = stream.read().rstrip("\n").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise UserError(f"{path}:{number}: is empty; each line is a text")
        return lines
    if kind in (".csv", ".tsv"):
        rows = lists(path)
        _, names = next(rows, ("", []))
        return [_field(where, dict(zip(names, fields, strict=False)), column) for where, fields in rows]
    if kind in (".jsonl", ".parquet"):
        return [_field(where, row, column) for where, row in objects(path)]
    raise UserError(f"{path}: .txt, .csv, .tsv, .jsonl or .parquet would be right")


def _field(where: str, row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise UserError(f'{where}: has no text in "{column}"{nearest(column, row)}; it has {", ".join(row)}')
    return value


def write_vectors(path: Path, texts: Sequence[str], vectors: torch.Tensor) -> None:
    """Write vectors [n, d] fp32: .npy (the array), .npz (ids, vectors), .parquet and .jsonl (text, vector)."""
    array = vectors.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, array)
        elif path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, ids=np.arange(len(array)), vectors=array)
        elif path.suffix == ".parquet":
            from datasets import Dataset, disable_progress_bars
            disable_progress_bars()
            Dataset.from_dict({"text": list(texts), "vector": array.tolist()}).to_parquet(str(temporary))
        else:
            with temporary.open("w", encoding="utf-8") as out:
                for text, vector in zip(texts, array.tolist(), strict=True):
                    out.write(json.dumps({"text": text, "vector": vector}, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
