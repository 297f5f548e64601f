"""What the pages on the families are held to: their tables, the keys in them, and commands that are really ours."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from typer.main import get_command

from pretrain.cli.main import app
from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.config.sections import child_annotation, fields_of, section_class
from pretrain.config.yaml_io import parse_yaml

DOCS = Path(__file__).parents[2] / "docs"


def rows(page: str, section: str) -> list[list[str]]:
    """Cells of the tables of a section, without the first one's head."""
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def exists(key: str, tags: Mapping[str, Any]) -> bool:
    """Whether a run config has this key, where `tags` picks the classes of its polymorphic sections."""
    annotation: Any = RunConfig
    value: Any = tags
    for part in key.split("."):
        section = section_class(annotation, value)
        if section is None or part not in fields_of(section):  # a free mapping, a scalar, or no such key
            return False
        annotation, value = child_annotation(annotation, value, part), value.get(part, {}) if value else {}
    return True


def commands(page: str) -> list[str]:
    """Every `pretrain COMMAND ...` of a page: lines of its blocks, and what stands between backticks."""
    blocks, text = page.split("```")[1::2], "".join(page.split("```")[::2])
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]
    starts = ("pretrain ", "!pretrain ")
    found = [line.removeprefix("!") for line in [*lines, *inline] if line.startswith(starts)]
    return [line for line in found if len(line.split()) > 2]  # less is a command's name in a sentence


def parsed(command: str) -> tuple[str, list[str]]:
    """(name of the subcommand, its words) of a command that the command line understands. Nothing of it is run.

    Raises ValueError for any other.
    """
    words = shlex.split(command, comments=True)
    assert words[0] == "pretrain", command
    here: Any = get_command(app)
    context = click.Context(here)
    names, rest = [], words[1:]
    while hasattr(here, "get_command"):
        names.append(rest[0])
        found = here.get_command(context, rest[0])
        assert found is not None, f"{command}: no command {rest[0]}"
        here, rest = found, rest[1:]
        context = click.Context(here, parent=context, info_name=names[-1])
    try:
        here.make_context(names[-1], list(rest), parent=context.parent)
    except Exception as error:  # of the click that typer brings along, or of click itself
        raise ValueError(f"{command}: {error}") from None
    return " ".join(names), rest


def sets_of(words: list[str]) -> list[str]:
    """The values of `--set`."""
    return [value for flag, value in itertools.pairwise(words) if flag == "--set"]


def settings_take_effect(target: str, words: list[str]) -> RunConfig:
    """The config of a command on preset `target`; every `--set` of it is found there."""
    config = load_run_config(target, sets_of(words)).config
    for text in sets_of(words):
        key, _, value = text.partition("=")
        found = functools.reduce(getattr, key.split("."), config)
        wanted = parse_yaml(value, text).values
        assert found == wanted or str(found) == wanted, text
    return config
