"""`pretrain data`: look into prepared data."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.data_at import at
from pretrain.cli.data_audit import audit
from pretrain.cli.data_mix import mix
from pretrain.cli.options import JsonOption
from pretrain.cli.text import excerpt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_prep.stats import SplitStats

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Look into prepared data.")
app.command()(at)
app.command()(audit)
app.command()(mix)

DatasetArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Dataset folder written by `pretrain prep`.")]


@app.command()
def stats(folder: DatasetArgument, as_json: JsonOption = False) -> None:
    """Tokens, documents, bytes a token and lengths of documents, by split."""
    from data_prep.manifest import Manifest
    from data_prep.stats import split_stats
    manifest = Manifest.load(folder)
    found = [split_stats(manifest, name) for name in manifest.splits]
    if as_json:
        rows = {s.name: {"documents": s.documents, "tokens": s.tokens, "bytes": s.bytes, "shards": s.shards,
                         "bytes_per_token": s.bytes_per_token, "mean_tokens": s.mean_tokens, "longest": s.longest,
                         "histogram": s.histogram.tolist(), "by_source": s.by_source} for s in found}
        typer.echo(json.dumps({"fingerprint": manifest.fingerprint, "vocab_size": manifest.vocab_size, "splits": rows}))
        return
    typer.echo(f"{folder}: fingerprint {manifest.fingerprint[:16]}, {manifest.vocab_size:,} token ids, "
               + (f"blocks of {manifest.pairs.block_pairs:,} pairs" if manifest.pairs
                  else f"blocks of {manifest.block_tokens:,} tokens"))
    for split in found:
        _print_split(split, manifest.kind)


def _print_split(stats: SplitStats, kind: str) -> None:
    typer.echo(f"\n{stats.name}: {stats.documents:,} {kind}, {stats.tokens:,} tokens, "
               f"{stats.bytes:,} bytes of text, {stats.shards:,} shards")
    if not stats.tokens:
        return
    typer.echo(f"  {stats.bytes_per_token:.3f} bytes a token; {stats.mean_tokens:,.1f} tokens a {kind[:-1]}, "
               f"longest {stats.longest:,}")
    for source, (documents, size) in stats.by_source.items():
        typer.echo(f"  source {source}: {documents:,} {kind}, {size:,} bytes")
    typer.echo("  tokens a document:" if kind == "documents" else "  tokens a pair, query and positive:")
    counts = stats.histogram.tolist()
    filled = [i for i, count in enumerate(counts) if count]
    for i in range(filled[0], filled[-1] + 1):
        bar = "#" * round(40 * counts[i] / max(counts))
        typer.echo(f"  {2**i:>11,} - {2**(i + 1) - 1:<11,} {counts[i]:>10,} {bar}".rstrip())


@app.command()
def verify(
    folder: DatasetArgument,
    sample: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the shards to hash; 1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Which shards a sample draws.")] = 0,
) -> None:
    """Check every file against the manifest and name each fault; exit code 3 where there is one."""
    from data_prep.verify import verify_dataset
    from pretrain.errors import DataCorruption
    started = time.perf_counter()
    report = verify_dataset(folder, sample, seed)
    seconds = time.perf_counter() - started
    for fault in report.faults:
        typer.echo(fault)
    if report.faults:
        raise DataCorruption(f"{folder}: {len(report.faults)} fault{'s' if len(report.faults) > 1 else ''} found")
    typer.echo(f"{folder}: sound; {report.shards:,} shards hashed, {report.bytes / 1e6:,.1f} MB in {seconds:.2f} s "
               f"({report.bytes / 1e6 / seconds:,.0f} MB/s)")


@app.command()
def peek(
    folder: DatasetArgument,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    n: Annotated[int, typer.Option("--n", min=1, help="Documents or pairs to show.")] = 3,
    offset: Annotated[int, typer.Option(min=0, help="Number of the first.")] = 0,
    chars: Annotated[int, typer.Option(min=0, help="Characters shown of each document; 0: all.")] = 400,
) -> None:
    """Show documents as the model will see them, decoded, with source and provenance."""
    from itertools import islice

    from data_prep.manifest import TOKENIZER, Manifest
    from data_prep.pairs import stored_pairs
    from data_prep.stats import stored_documents
    from data_prep.tokenizer import load_tokenizer
    from pretrain.errors import UserError
    manifest = Manifest.load(folder)
    opened = manifest.split(split)
    if offset >= opened.docs:
        raise UserError(f"--offset {offset}: split {split} of {folder} has {opened.docs:,} {manifest.kind}, "
                        "counted from 0")
    tokenizer = load_tokenizer(folder / TOKENIZER) if manifest.tokenizer_sha256 else None
    if manifest.kind == "pairs":
        for pair in islice(stored_pairs(opened, offset), n):
            typer.echo(f"--- {split} {offset}: {json.dumps(pair.provenance, ensure_ascii=False)}")
            sides = [("query", pair.query), ("positive", pair.positive), *(("negative", ids) for ids in pair.negatives)]
            for side, ids in sides:
                typer.echo(f"{side}, {len(ids):,} tokens: {excerpt(_decoded(tokenizer, ids.tolist()), chars)}")
            offset += 1
        return
    for document in islice(stored_documents(opened, offset), n):
        typer.echo(f"--- {split} {document.position}: {len(document.tokens):,} tokens, {document.utf8_bytes:,} bytes, "
                   f"{json.dumps(document.provenance, ensure_ascii=False)}")
        typer.echo(excerpt(_decoded(tokenizer, document.tokens.tolist()), chars))


@app.command()
def pack(
    folder: DatasetArgument,
    seq_len: Annotated[int, typer.Option(min=2, max=1_048_576, help="Tokens a sample: data.seq_len of the run.")],
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
) -> None:
    """Plan samples of whole documents by best fit, for runs with data.source.packing: best_fit."""
    from data_prep.manifest import Manifest
    from data_prep.packing import make_plan
    plan = make_plan(Manifest.load(folder), split, seq_len)
    typer.echo(f"{folder}: split {split} in {plan.samples:,} samples of {seq_len:,} tokens, {len(plan.pieces):,} "
               f"pieces, {plan.padding:.2%} padding")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Dataset folder to write.")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Datasets to join, in this order.")],
) -> None:
    """Join prepared datasets of one tokenizer: splits of one name together, copies once."""
    from data_prep.merge import merge_datasets
    manifest = merge_datasets(out, folders)
    for name, split in manifest.splits.items():
        typer.echo(f"{name}: {split.docs:,} {manifest.kind}, {split.tokens:,} tokens")
    dropped: Counter[str] = Counter()
    for outcomes in manifest.provenance["counts"].values():
        dropped.update({reason: entry["documents"] for reason, entry in outcomes.items()})
    elsewhere = dropped["query_in_other_split"] + dropped["passage_in_other_split"]
    typer.echo(f"{out}: fingerprint {manifest.fingerprint[:16]}, {dropped['duplicate']:,} copies dropped"
               + (f", {elsewhere:,} pairs that belong to another split" if elsewhere else ""))


def _decoded(tokenizer: Tokenizer | None, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))


@app.command()
def beir(
    folder: DatasetArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    split: Annotated[str, typer.Option(help="Split whose queries are judged.")] = "test",
    pool: Annotated[int | None, typer.Option(min=2, help="Passages, filled up from split train; default: those of the "
                                             "split alone.")] = None,
) -> None:
    """Write a split of pairs as a BEIR folder of whole texts; mined ones are read from the packages again."""
    from data_prep.beir import write_beir
    counts = write_beir(folder, split, out, pool=pool)
    typer.echo(f"{out}: {counts.queries:,} queries, {counts.passages:,} passages, {counts.added:,} of them from train")
