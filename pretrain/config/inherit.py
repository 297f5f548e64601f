"""A run that starts from another's weights (`train.init_from`) is of that run's model, but for what its config says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config.merge import Layered
from pretrain.config.model import ModelConfig, Section
from pretrain.config.run import RunConfig
from pretrain.config.sections import child_annotation, dotted, fields_of, flatten, plain, section_class
from pretrain.config.yaml_io import Key, inline, read_yaml
from pretrain.errors import ConfigError

KEY = "train.init_from"


def config_of_weights(weights: Path) -> Path | None:
    """The resolved config of the run that a run folder, a checkpoint in it or an export is of, where one is there."""
    places = (weights / "config.yaml", weights / "training_config.yaml", weights.parent.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def model_section(weights: Path) -> dict[str, Any] | None:
    """Plain values of section `model` of the run whose weights these are.

    None where there is no config, or none that can be read: weights of elsewhere say nothing about theirs.
    """
    file = config_of_weights(weights)
    if file is None:
        return None
    try:
        values = read_yaml(file, str(file)).values
    except (ConfigError, OSError):
        return None
    section = values.get("model") if isinstance(values, dict) else None
    return section if isinstance(section, dict) else None


def inherit_model(layered: Layered, schema: type[Section]) -> None:
    """Lay the model of `train.init_from` under what is given, key by key; another family's is left alone."""
    train = layered.values.get("train")
    source = train.get("init_from") if schema is RunConfig and isinstance(train, Mapping) else None
    theirs = model_section(Path(source)) if isinstance(source, str) else None
    own = layered.values.get("model", {})
    if theirs is None or not isinstance(own, dict) or own.get("family", theirs.get("family")) != theirs.get("family"):
        return
    layered.values["model"] = own
    _fill(layered, child_annotation(schema, layered.values, "model"), own, theirs, ("model",), f"{KEY} ({source})")


def _fill(layered: Layered, annotation: Any, own: dict[str, Any], theirs: Mapping[str, Any], path: Key,
          origin: str) -> None:
    """Sections merge; what is no section (a free mapping, say) is theirs as a whole or not at all.

    Keys that the section does not have (any more) stay behind.
    """
    section = section_class(annotation, {**theirs, **own})
    for key, value in theirs.items():
        here = (*path, key)
        if section is None or key not in fields_of(section):
            continue
        if key not in own:
            own[key] = copy.deepcopy(value)
            layered.mark(here, value, origin)
        elif isinstance(value, Mapping) and isinstance(own[key], dict):
            inner = child_annotation(annotation, {**theirs, **own}, key)
            if section_class(inner, own[key]) is not None:
                _fill(layered, inner, own[key], value, here, origin)


def told_of_model(model: ModelConfig, origins: Mapping[str, str], source: Path) -> tuple[list[str], list[str]]:
    """(what was inherited and is no default, what differs from the run whose weights are taken), as "model.key value".

    Keys that only say how to train are left out. Both empty where nothing is known of that run's config.
    """
    theirs = flatten({"model": model_section(source) or {}})
    ours = flatten({"model": plain(model)})
    kept = {path: value for path, value in theirs.items() if path[-1] not in model.changeable}
    took = [path for path in kept if origins.get(dotted(path), "").startswith(KEY) and path in ours]
    defaults = {key: info.get_default(call_default_factory=True) for key, info in fields_of(type(model)).items()}
    inherited = [f"{dotted(path)} {inline(ours[path])}" for path in took
                 if len(path) == 2 and ours[path] != defaults.get(str(path[1]))]
    differ = [f"{dotted(path)} is {inline(value)} there, {inline(ours[path])} here" for path, value in kept.items()
              if path in ours and ours[path] != value]
    return inherited, differ
