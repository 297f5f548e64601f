"""`pretrain doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import JsonOption


def doctor(bundle: Annotated[Path | None, typer.Option("--bundle", metavar="RUN", help=(
               "Collect config, environment, status, the last lines of log and metrics and this report into one file: "
               "no data, no weights, no secrets."))] = None,
           output: Annotated[Path | None, typer.Option("--output", "-o", help="File of the bundle (.tar.gz).")] = None,
           as_json: JsonOption = False) -> None:
    """Say what this machine can do: hardware, versions, precision, compiler, and which presets fit."""
    from pretrain.cli.checkup import as_dicts, examine, report
    findings = examine()
    if bundle is not None:
        from pretrain.cli.bundle import write_bundle
        target = output or Path(f"{bundle.resolve().name}-bundle.tar.gz")
        names = write_bundle(bundle, target, report(findings))
        typer.echo(f"{target}: {', '.join(names)}")
    elif as_json:
        typer.echo(json.dumps(as_dicts(findings), indent=2))
    else:
        typer.echo(report(findings))
