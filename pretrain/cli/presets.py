"""`pretrain presets`: the configs that come with the project."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pretrain.cli.options import JsonOption
from pretrain.config.load import dump_yaml, load_run_config
from pretrain.config.presets import list_presets, preset_path

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="List and show the presets.")


def _summary(name: str) -> dict[str, Any]:
    """One row: exact counts from the schema, and the first comment of the file."""
    path = preset_path(name)
    config = load_run_config(path).config
    first = path.read_text(encoding="utf-8").lstrip().split("\n", 1)[0]
    return {"preset": name, **config.model.summary(), "seq_len": config.data.seq_len,
            "objective": config.objective.name, "zero_stage": config.engine.zero_stage,
            "about": first.removeprefix("#").strip() if first.startswith("#") else ""}


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Print every preset with its family, exact parameter counts and length."""
    rows = [_summary(name) for name in list_presets()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = {"preset": "PRESET", "family": "FAMILY", "parameters": "PARAMETERS", "trainable": "TRAINABLE",
               "seq_len": "SEQ_LEN", "objective": "OBJECTIVE", "about": "ABOUT"}
    cells = [list(columns.values())] + [[f"{v:,}" if isinstance(v, int) else str(v) for v in map(row.get, columns)]
                                        for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(rows[0][key], int) if rows else False for key in columns]
    for line in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        typer.echo("  ".join(padded).rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a preset.")], as_json: JsonOption = False) -> None:
    """Print a preset: its figures, then the whole config with the origin of every value."""
    loaded = load_run_config(preset_path(name))
    figures = _summary(name)
    if as_json:
        typer.echo(json.dumps({**figures, "config": loaded.values, "origins": loaded.origins}, indent=2))
        return
    for key, value in figures.items():
        typer.echo(f"# {key}: {value:,}" if isinstance(value, int) else f"# {key}: {value}")
    typer.echo(dump_yaml(loaded), nl=False)
