"""From files and `--set` to a validated config, with the origin of every value.

A config is YAML. `extends:` names a preset, a file (relative to the one that says so) or a list of them; later ones
win, the file itself wins over all of them, and `--set a.b=value` over the file. Of the model, what none of them says is
that of `train.init_from`. Everything wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.config.inherit import inherit_model
from pretrain.config.merge import Layered, apply_sets
from pretrain.config.model import Section
from pretrain.config.presets import display_path, preset_path
from pretrain.config.problems import booleans_as_numbers, collect
from pretrain.config.run import RunConfig
from pretrain.config.sections import dotted, flatten, plain
from pretrain.config.yaml_io import Key, inline, read_yaml
from pretrain.errors import ConfigError, ConfigErrors, UserError

DEFAULT = "default"
S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A validated run config, its plain values (defaults included), and where each value came from."""

    config: RunConfig
    values: dict[str, Any]
    origins: dict[str, str]
    """Dotted key -> "default", a file, "--set", or "train.init_from (FOLDER)"."""


def load_run_config(target: str | Path, sets: Sequence[str] = ()) -> LoadedConfig:
    """Load a preset name or a YAML path. Raises ConfigError (ConfigErrors where several things are wrong)."""
    config, origins = load_yaml_model(RunConfig, resolve_target(target), sets)
    return LoadedConfig(config, plain(config), origins)


def load_yaml_model(model: type[S], path: str | Path, sets: Sequence[str] = ()) -> tuple[S, dict[str, str]]:
    """Load any section class from a YAML file. Returns the instance and the origin of each of its values."""
    path = Path(path)
    where = display_path(path)
    layered = Layered()
    _lay_file(layered, model, path, ())
    problems = apply_sets(layered, model, sets)
    inherit_model(layered, model)
    problems += booleans_as_numbers(model, layered, where)
    instance, found = collect(lambda: model.model_validate(layered.values), model, layered, where)
    problems += found
    if problems:
        raise ConfigErrors(problems)
    return instance, origins_of(instance, layered)


def resolve_target(target: str | Path) -> Path:
    """The file of a preset name or YAML path: what has a slash or a YAML ending, or exists, is a path."""
    path = Path(target)
    if isinstance(target, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.exists():
        return path
    return preset_path(str(target))


def origins_of(config: Section, layered: Layered) -> dict[str, str]:
    """Origin of every leaf of a validated config."""
    return {dotted(path): layered.origins.get(path, DEFAULT) for path in flatten(plain(config))}


def _lay_file(layered: Layered, model: type[Section], path: Path, above: tuple[Path, ...]) -> None:
    """Lay what `path` extends, then `path` itself. `above` are the files that led here."""
    where = display_path(path)
    resolved = path.resolve()
    if resolved in above:
        circle = [*above[above.index(resolved):], resolved]
        raise ConfigError("extends", "goes in a circle: " + " -> ".join(display_path(p) for p in circle), where=where)
    document = read_yaml(path, where)
    values = {} if document.values is None else document.values
    if not isinstance(values, dict):
        raise ConfigError("", "a config is sections of key: value, not a " + type(values).__name__, where=where)
    for parent in _parents(values.get("extends"), where):
        place = f"{where}:{document.lines.get(('extends',), 1)}"
        _lay_file(layered, model, _parent_path(parent, path, place), (*above, resolved))
    layered.overlay(model, {k: v for k, v in values.items() if k != "extends"}, where, document.lines)


def _parents(extends: Any, where: str) -> list[str]:
    parents = [] if extends is None else [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError("extends", "must be a preset name, a path or a list of them", where=where, value=str(extends))
    return parents


def _parent_path(parent: str, child: Path, place: str) -> Path:
    path = child.parent / parent
    if Path(parent).suffix in (".yaml", ".yml") or len(Path(parent).parts) > 1:
        if not path.is_file():
            raise ConfigError("extends", f"there is no file {display_path(path)}", where=place, value=parent)
        return path
    try:
        return preset_path(parent)
    except UserError as error:
        raise ConfigError("extends", str(error), where=place, value=parent) from None


def dump_yaml(config: Section | LoadedConfig, with_origins: bool = True) -> str:
    """A config as YAML that loads to an equal one; with origins as comments where they are known."""
    values = config.values if isinstance(config, LoadedConfig) else plain(config)
    origins = config.origins if isinstance(config, LoadedConfig) and with_origins else {}
    lines = list(_lines(values, (), origins))
    width = min(60, max((len(text) for text, origin in lines if origin), default=0))
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _lines(values: Mapping[str, Any], path: Key, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(line, origin) of a section in block style; lists of sections as one `-` each, other values on one line."""
    pad = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        name = inline(key)
        if isinstance(value, Mapping) and value:
            yield f"{pad}{name}:", ""
            yield from _lines(value, here, origins)
        elif isinstance(value, list) and any(isinstance(item, Mapping) and item for item in value):
            yield f"{pad}{name}:", ""
            for index, item in enumerate(value):
                yield f"{pad}- {inline(item)}", origins.get(dotted((*here, index)), _common(origins, (*here, index)))
        else:
            yield f"{pad}{name}: {inline(value)}", origins.get(dotted(here), "")


def _common(origins: Mapping[str, str], path: Key) -> str:
    """Origins below `path`, each once."""
    start = dotted(path) + "."
    return ", ".join(dict.fromkeys(origin for key, origin in origins.items() if key.startswith(start)))


def diff_configs(a: Section | LoadedConfig, b: Section | LoadedConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in `a`, value in `b`) where they differ; a key that one of them lacks is None there."""
    left, right = (flatten(c.values if isinstance(c, LoadedConfig) else plain(c)) for c in (a, b))
    keys = [*left, *(key for key in right if key not in left)]
    return [(dotted(key), left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]
