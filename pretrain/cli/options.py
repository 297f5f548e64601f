"""Options that commands share: which config, what to change in it, how much to say."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Annotated

import typer

from pretrain.config.load import LoadedConfig, load_run_config
from pretrain.config.presets import preset_path
from pretrain.errors import UserError


class LogLevel(StrEnum):
    """Least severe messages that are shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _set_level(level: LogLevel) -> LogLevel:
    logging.basicConfig(level=level.value.upper(), format="%(levelname)s %(name)s: %(message)s", force=True)
    return level


ConfigArgument = Annotated[str | None, typer.Argument(metavar="CONFIG", show_default=False,
                                                      help="YAML file of the run, or the name of a preset.")]
PresetOption = Annotated[str | None, typer.Option("--preset", metavar="NAME", show_default=False,
                                                  help="Preset in place of a file; see `pretrain presets list`.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", show_default=False, default_factory=list,
                                              help="Change one value, as --set optim.lr=1e-4; may be repeated.")]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", callback=_set_level,
                                                  help="Least severe messages shown.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, for programs.")]


def load_config(config: str | None, preset: str | None, sets: list[str]) -> LoadedConfig:
    """The config that the shared options describe. Raises UserError unless exactly one of file and preset is given."""
    if preset is not None and config is None:
        return load_run_config(preset_path(preset), sets)
    if config is not None and preset is None:
        return load_run_config(config, sets)
    raise UserError("give a YAML file or --preset NAME" + (", not both" if config else ""))
