"""`pretrain prep`: raw text to shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import LogLevel, LogLevelOption, SetOption
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_prep.config import PrepConfig


def prep(
    sets: SetOption,
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", show_default=False,
                                                  help="YAML file that describes the dataset.")] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", show_default=False,
                                               help="Config in place of a file, by name: stdlib.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", show_default=False,
                                             help="Dataset folder, in place of the config's.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, show_default=False,
                                                help="Tokenizing processes; the result does not depend on it.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False,
                                               help="Of all processes together, as 500 MB or 4 GB.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, show_default=False,
                                             help="Do only this share of the work, counted from 0.")] = None,
    of: Annotated[int | None, typer.Option(min=1, show_default=False, help="Shares there are in all.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset of another config.")] = False,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Raw text to shards: read, clean, deduplicate, split, train the tokenizer, tokenize, write.

    The folder appears when it is complete. Where it is complete already nothing is done; where an earlier run was
    interrupted, this one goes on. With --rank R --of N a share is prepared, on any machine that sees the folder: run
    every rank, run them again when told to, then the plain command, which writes the same bytes as if it were alone.
    """
    from data_prep.config import PrepConfig
    from data_prep.pipeline import is_complete, prepare
    from data_prep.progress import RichReporter
    from pretrain.config.load import load_yaml_model
    loaded, _ = load_yaml_model(PrepConfig, _target(config, preset), sets)
    changes = {"out": None if out is None else str(out), "workers": workers, "memory": memory}
    changes = {key: value for key, value in changes.items() if value is not None}
    loaded = PrepConfig.model_validate(loaded.model_dump() | changes)
    if (rank is None) != (of is None) or (rank is not None and of is not None and rank >= of):
        raise UserError(f"--rank {rank} --of {of}: give both, the rank below the number of shares")
    if rank is not None and of is not None:
        _share(loaded, rank, of)
        return
    if not overwrite and is_complete(loaded):
        prepare(loaded)
        typer.echo(f"{loaded.out}: complete already, made by this config; nothing to do (--overwrite makes it again)")
        return
    started = time.perf_counter()
    with RichReporter() as reporter:
        manifest = prepare(loaded, overwrite=overwrite, reporter=reporter)
    seconds = time.perf_counter() - started
    size = sum(split.bytes for split in manifest.splits.values())
    for source, outcomes in manifest.provenance["counts"].items():
        typer.echo(f"{source}: " + ", ".join(f"{n['documents']:,} {outcome}" for outcome, n in outcomes.items()))
    for name, split in manifest.splits.items():
        typer.echo(f"{name}: {split.docs:,} {manifest.kind}, {split.tokens:,} tokens, "
                   f"{split.bytes / 1e6:.2f} MB of text")
        if not split.docs:
            typer.echo(f"warning: split {name} is empty; give it a larger share than {loaded.splits[name]:g}", err=True)
    typer.echo(f"{loaded.out}: {manifest.vocab_size:,} token ids, {size / 1e6:.1f} MB of text in {seconds:.1f} s "
               f"({size / 1e6 / seconds:.2f} MB/s)")


def _share(config: PrepConfig, rank: int, of: int) -> None:
    from data_prep.pipeline import prepare_share
    from data_prep.progress import RichReporter
    with RichReporter() as reporter:
        share = prepare_share(config, rank, of, reporter=reporter)
    done = f"share {rank} of {of}: {share.pieces:,} pieces of the sources read"
    if share.missing:
        typer.echo(f"{done}; {share.missing:,} of other shares are missing, so what is kept is not known yet: run "
                   "this share again when all are read")
    else:
        typer.echo(f"{done}, {share.units:,} units tokenized; when all shares say so, run the command without --rank")


def _target(config: Path | None, preset: str | None) -> Path:
    """The file of a config given by path or by name. Raises UserError unless exactly one of them is given."""
    from pretrain.config.presets import configs_dir
    from pretrain.config.suggest import nearest
    if (config is None) == (preset is None):
        raise UserError("give a YAML file or --preset NAME" + (", not both" if config else ""))
    if config is not None:
        return config
    known = {path.stem: path for path in sorted((configs_dir() / "prep").glob("*.yaml"))}
    if preset not in known:
        raise UserError(f'no dataset preset "{preset}"{nearest(str(preset), known)}; known: {", ".join(known)}')
    return known[preset]
