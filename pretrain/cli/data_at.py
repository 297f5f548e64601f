"""`pretrain data at`: what the model saw in a batch of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli.options import JsonOption
from pretrain.cli.text import excerpt

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from pretrain.config.run import RunConfig
    from pretrain.data.batch import SampleSource
    from pretrain.data.open import TrainingData


def at(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder (or its config.yaml).")],
    batch: Annotated[int, typer.Option("--batch", min=0, help="Number k of the global batch, counted from 0.")],
    rows: Annotated[int, typer.Option(min=0, help="Samples shown; 0: all.")] = 8,
    chars: Annotated[int, typer.Option(min=0, help="Characters of text shown of each sample; 0: all.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Show the samples of batch k of a run: place in the order, window, where its documents came from, text."""
    from pretrain.config.load import load_run_config
    from pretrain.data.open import open_training
    config = load_run_config(run / "config.yaml" if run.is_dir() else run).config
    training = open_training(config, _whole_batch(config))
    size = training.order.global_batch_size
    tokenizers: dict[Path, Tokenizer] = {}
    found = [_sample(training, batch, row, tokenizers) for row in range(min(rows or size, size))]
    if as_json:
        typer.echo(json.dumps({"batch": batch, "fingerprint": training.fingerprint, "samples": found}))
        return
    first = batch * size
    epoch = f", epoch {first / training.epoch_samples:.3f}" if training.epoch_samples else ""
    typer.echo(f"batch {batch}: samples {first:,} to {first + size - 1:,}{epoch}; order {training.fingerprint[:16]}")
    for sample in found:
        part = f"part {sample['part']} " if "part" in sample else ""
        place = f", tokens {sample['tokens'][0]:,} to {sample['tokens'][1]:,}" if "tokens" in sample else ""
        typer.echo(f"--- sample {sample['sample']:,}: {part}window {sample['window']:,}{place}")
        for document in sample["documents"]:
            typer.echo("    " + excerpt(json.dumps(document, ensure_ascii=False), 0))
        typer.echo(excerpt(sample["text"], chars))
    if len(found) < size:
        typer.echo(f"({size - len(found):,} more samples; --rows 0 shows all)")


def _whole_batch(config: RunConfig) -> Any:
    """The run's global batch as one piece. Which ranks shared it does not matter to the order."""
    from pretrain.config.run import ResolvedBatch
    total = config.batch.global_batch_size or config.batch.resolve(config.launch.nproc).global_batch_size
    return ResolvedBatch(global_batch_size=total, micro_batch_size=total, gradient_accumulation_steps=1,
                         data_parallel_size=1)


def _sample(training: TrainingData, k: int, row: int, tokenizers: dict[Path, Tokenizer]) -> dict[str, Any]:
    """One row of a batch in plain values."""
    from pretrain.data.loader import read_rows
    from pretrain.data.mixture import MixtureSource
    from pretrain.data.packed import PackedSource
    from pretrain.data.pairs import PairSource
    from pretrain.data.shards import ShardSource
    batch = read_rows(training.source, training.order, k, row, row + 1)
    window = int(batch["source_ids"][0])
    sample: dict[str, Any] = {"sample": int(batch.sample_ids[0])}
    source: SampleSource = training.source
    if isinstance(source, MixtureSource):
        sample["part"] = int(batch["source_index"][0])
        source = source.parts[sample["part"]]
    sample |= {"window": window, "documents": []}
    if isinstance(source, ShardSource):
        start = window * source.stride
        sample |= {"tokens": [start, start + source.seq_len - 1], "documents": source.provenance(window)}
    if isinstance(source, PackedSource):
        sample["documents"] = source.provenance(window)
    sides = [""]
    if isinstance(source, PairSource):
        sample["documents"], sides = source.provenance(window), ["query_", "positive_"]
    ids = [i for side in sides if f"{side}input_ids" in batch.tensors
           for i in _unpadded(batch[f"{side}input_ids"][0], batch.tensors.get(f"{side}attention_mask"))]
    return sample | {"text": _decode(source, ids, tokenizers)}


def _unpadded(ids: torch.Tensor, masks: torch.Tensor | None) -> list[int]:
    """Ids [T] of a row without those that its mask [1, T] hides."""
    kept: list[int] = (ids if masks is None else ids[masks[0]]).tolist()
    return kept


def _decode(source: SampleSource, ids: list[int], tokenizers: dict[Path, Tokenizer]) -> str:
    """Text of the ids, or the ids where the dataset has no tokenizer; `tokenizers` keeps those loaded."""
    from data_prep.manifest import TOKENIZER
    from data_prep.tokenizer import load_tokenizer
    from pretrain.data.stored import StoredSplit
    if not isinstance(source, StoredSplit) or source.manifest.tokenizer_sha256 is None:
        return " ".join(map(str, ids))
    path = source.manifest.folder / TOKENIZER
    if path not in tokenizers:
        tokenizers[path] = load_tokenizer(path)
    return str(tokenizers[path].decode(ids, skip_special_tokens=False))
