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
    typer.echo(f"{steps:,} steps of {sum(p.drawn for p in parts) // steps:,} samples of {loaded.config.data.seq_len:,} "
               "tokens")


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
    sizes = [_samples(part, config) for part in parts]
    batch = config.batch.resolve(config.launch.nproc)
    try:
        steps = config.train.length.to_steps(
            micro_steps_per_step=batch.gradient_accumulation_steps, samples_per_step=batch.global_batch_size,
            tokens_per_step=batch.global_batch_size * config.data.seq_len, epoch_samples=None if mixed else sizes[0])
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
    return steps, [Part(_name(part), size, None if size is None else size * config.data.seq_len, count / total,
                        round(count), count / size if size else None)
                   for part, size, count in zip(parts, sizes, drawn.tolist(), strict=True)]


def _samples(source: SourceConfig, config: RunConfig) -> int | None:
    """Samples of a source, from what its manifest says; None where it has no end."""
    from data_prep.manifest import Manifest
    from data_prep.packing import load_plan
    from pretrain.config.plan import windows
    from pretrain.config.source import PairsConfig, ShardsConfig, SyntheticConfig
    if isinstance(source, SyntheticConfig):
        return source.samples
    if not isinstance(source, ShardsConfig | PairsConfig):
        return None
    manifest = Manifest.read(Path(source.path))
    manifest.require("documents" if isinstance(source, ShardsConfig) else "pairs")
    split = manifest.split(source.split)
    if isinstance(source, ShardsConfig) and source.packing == "best_fit":
        return load_plan(manifest, source.split, config.data.seq_len).samples
    return (windows(split.tokens, config.data.seq_len, config.data.stride) if isinstance(source, ShardsConfig)
            else split.docs)


def _name(source: SourceConfig) -> str:
    path = getattr(source, "path", None)
    return source.kind if path is None else f"{path}:{getattr(source, 'split', '')}"
