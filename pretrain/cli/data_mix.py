"""`pretrain data mix`: what of each source a run will see."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import ConfigArgument, JsonOption, PresetOption, SetOption, load_config

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig
    from pretrain.config.source import SourceConfig


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a run."""

    name: str
    samples: int | None
    """It has; None: without end."""
    tokens: int | None
    """It holds, each counted once however windows overlap."""
    share: float
    """Of all samples the run draws."""
    drawn: int
    """Samples the run draws of it."""
    epochs: float | None


def mix(
    sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Said for clarity: samples are mixed while a run reads "
                                          "them, this command never writes.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show tokens of each source of a run, its share, and how many epochs of it the run will see."""
    loaded = load_config(config, preset, sets)
    steps, parts = mix_of(loaded.config)
    if as_json:
        typer.echo(json.dumps({"steps": steps, "parts": [asdict(part) for part in parts]}))
        return
    width = max(len(part.name) for part in parts)
    typer.echo(f"{'source':<{width}} {'samples':>14} {'tokens':>17} {'share':>8} {'drawn':>14} {'epochs':>8}")
    for part in parts:
        samples, tokens = ("without end" if n is None else f"{n:,}" for n in (part.samples, part.tokens))
        epochs = "" if part.epochs is None else f"{part.epochs:.3f}"
        typer.echo(f"{part.name:<{width}} {samples:>14} {tokens:>17} {part.share:>8.2%} {part.drawn:>14,} {epochs:>8}")
    typer.echo(f"{steps:,} steps of {sum(p.drawn for p in parts) // steps:,} samples of "
               f"{loaded.config.data.tokens_per_sample:,} tokens")


def mix_of(config: RunConfig) -> tuple[int, list[Part]]:
    """(steps of the run, what it draws of each of its sources), by the very tables that the loader goes by.

    Raises UserError for datasets that are not there, ConfigError for a length or weights that do not fit.
    """
    import numpy as np

    from pretrain.config.source import MixtureConfig
    from pretrain.data.order import quota_table
    from pretrain.errors import ConfigError
    source = config.data.source
    mixed = isinstance(source, MixtureConfig)
    parts = [part.source for part in source.parts] if isinstance(source, MixtureConfig) else [source]
    sizes, tokens = zip(*(_size(part, config) for part in parts), strict=True)
    batch = config.batch.resolve(config.launch.nproc)
    try:
        steps = config.train.length.to_steps(
            micro_steps_per_step=batch.gradient_accumulation_steps, samples_per_step=batch.global_batch_size,
            tokens_per_step=batch.global_batch_size * config.data.tokens_per_sample,
            epoch_samples=None if mixed else sizes[0])
    except ValueError as error:
        raise ConfigError("train.length", str(error)) from None
    stages = source.shares(sizes) if isinstance(source, MixtureConfig) else [[1.0]]
    lengths = [stage.steps for stage in getattr(source, "curriculum", [])[:-1]]
    edges = [min(steps, int(edge)) for edge in np.cumsum([0, *lengths])] + [steps]
    drawn = np.zeros(len(parts))
    for (begin, end), weights in zip(pairwise(edges), stages, strict=True):
        table = quota_table(weights, getattr(source, "period", 1))
        drawn += (end - begin) * batch.global_batch_size * np.bincount(table, minlength=len(parts)) / len(table)
    total = steps * batch.global_batch_size
    return steps, [Part(_name(part), size, held, count / total, round(count), count / size if size else None)
                   for part, size, held, count in zip(parts, sizes, tokens, drawn.tolist(), strict=True)]


def _size(source: SourceConfig, config: RunConfig) -> tuple[int | None, int | None]:
    """(samples, tokens) of a source, from what its manifest says; None where it has no end."""
    from data_prep.manifest import Manifest
    from data_prep.packing import load_plan
    from pretrain.config.plan import windows
    from pretrain.config.source import PairsConfig, RemoteConfig, ShardsConfig, SyntheticConfig
    if isinstance(source, SyntheticConfig):
        return source.samples, None if source.samples is None else source.samples * config.data.seq_len
    if isinstance(source, RemoteConfig):
        from pretrain.data.remote_shards import open_remote
        there = open_remote(source, config.data)
        return len(there), there.split.tokens
    if not isinstance(source, ShardsConfig | PairsConfig):
        return None, None
    manifest = Manifest.read(Path(source.path))
    manifest.require("documents" if isinstance(source, ShardsConfig) else "pairs")
    split = manifest.split(source.split)
    if isinstance(source, PairsConfig):
        samples = split.docs
    elif source.packing == "best_fit":
        samples = load_plan(manifest, source.split, config.data.seq_len).samples
    else:
        samples = windows(split.tokens, config.data.seq_len, config.data.stride)
    return samples, split.tokens


def _name(source: SourceConfig) -> str:
    path = getattr(source, "path", None)
    return source.kind if path is None else f"{path}:{getattr(source, 'split', '')}"
