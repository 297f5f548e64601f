"""`pretrain config`: show, compare and describe configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import (
    ConfigArgument,
    JsonOption,
    LogLevel,
    LogLevelOption,
    PresetOption,
    SetOption,
    load_config,
)
from pretrain.config.load import diff_configs, dump_yaml, load_run_config
from pretrain.config.yaml_io import inline

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  help="Show, compare and describe configs.")


@app.command()
def show(sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None, as_json: JsonOption = False,
         log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Print the resolved config, every value with its origin. The output is itself a config."""
    loaded = load_config(config, preset, sets)
    if as_json:
        typer.echo(json.dumps({"config": loaded.values, "origins": loaded.origins}, indent=2))
    else:
        typer.echo(dump_yaml(loaded), nl=False)


@app.command()
def schema(output: Annotated[Path | None, typer.Option("--output", "-o", help="File in place of standard output.")
                             ] = None) -> None:
    """Print the JSON schema of config files, for editors that complete and check YAML."""
    from pretrain.config.json_schema import config_json_schema
    text = json.dumps(config_json_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


@app.command()
def diff(left: Annotated[str, typer.Argument(help="YAML file or preset.")],
         right: Annotated[str, typer.Argument(help="YAML file or preset.")],
         as_json: JsonOption = False) -> None:
    """Print where two configs differ, defaults included: `key: left -> right`."""
    rows = diff_configs(load_run_config(left), load_run_config(right))
    if as_json:
        typer.echo(json.dumps([{"key": key, "left": a, "right": b} for key, a, b in rows], indent=2))
        return
    for key, a, b in rows:
        typer.echo(f"{key}: {inline(a)} -> {inline(b)}")
    if not rows:
        typer.echo("no difference")


@app.command()
def changes() -> None:
    """Print what may change in the config of a run that goes on, and of a branch, as a Markdown table."""
    from pretrain.config.changes import table
    typer.echo(table(), nl=False)
