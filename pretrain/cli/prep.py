"""`pretrain prep`: raw text to shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import LogLevel, LogLevelOption, SetOption


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset of another config.")] = False,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Raw text to shards: read, deduplicate, split, train the tokenizer, tokenize, write.

    The folder appears when it is complete. Where it is complete already nothing is done.
    """
    from data_prep.config import PrepConfig
    from data_prep.pipeline import is_complete, prepare
    from data_prep.progress import RichReporter
    from pretrain.config.load import load_yaml_model
    loaded, _ = load_yaml_model(PrepConfig, _target(config, preset), sets)
    changes = {"out": None if out is None else str(out), "workers": workers}
    loaded = loaded.model_copy(update={key: value for key, value in changes.items() if value is not None})
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


def _target(config: Path | None, preset: str | None) -> Path:
    """The file of a config given by path or by name. Raises UserError unless exactly one of them is given."""
    from pretrain.config.presets import configs_dir
    from pretrain.config.suggest import nearest
    from pretrain.errors import UserError
    if (config is None) == (preset is None):
        raise UserError("give a YAML file or --preset NAME" + (", not both" if config else ""))
    if config is not None:
        return config
    known = {path.stem: path for path in sorted((configs_dir() / "prep").glob("*.yaml"))}
    if preset not in known:
        raise UserError(f'no dataset preset "{preset}"{nearest(str(preset), known)}; known: {", ".join(known)}')
    return known[preset]
