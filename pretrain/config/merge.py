"""Laying one config over another, with the origin of every value."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.config.model import Section
from pretrain.config.sections import child_annotation, dotted, fields_of, is_leaf, section_class, tag_of
from pretrain.config.suggest import nearest
from pretrain.config.yaml_io import Key, parse_yaml
from pretrain.errors import ConfigError

SET = "--set"


@dataclass(slots=True)
class Layered:
    """Values laid over each other so far, and where each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    """Of leaves: scalars, lists of scalars, empty sections."""
    places: dict[Key, str] = field(default_factory=dict)
    """Of everything that was given, sections too: `origin:line`, as messages name it."""

    def place(self, path: Key) -> str | None:
        """The place of the value at `path`, or of the nearest given section around it."""
        ends = range(len(path), 0, -1)
        return next((self.places[path[:end]] for end in ends if path[:end] in self.places), None)

    def overlay(self, schema: type[Section], over: Mapping[str, Any], origin: str, lines: Mapping[Key, int]) -> None:
        """Lay `over` on top: sections merge key by key, anything else replaces.

        A polymorphic section (model, objective, source) whose kind changes replaces the inherited one as a whole: the
        keys of another class mean nothing to it.
        """
        self._lay(schema, self.values, over, (), origin, lines)

    def mark(self, path: Key, value: Any, origin: str) -> None:
        """Note where a value that was put into `values` came from."""
        self._mark(path, value, origin, {})

    def assign(self, schema: type[Section], path: Key, value: Any, origin: str) -> None:
        """Set one value; numbers in `path` are indices of lists that exist already."""
        annotation: Any = schema
        container: Any = self.values
        for position, part in enumerate(path[:-1]):
            here = path[:position + 1]
            if isinstance(container, list):
                container, annotation = container[_index(container, here)], child_annotation(annotation, container, 0)
            else:
                key = str(part)
                inner = child_annotation(annotation, container, key)
                if container.get(key) is None:
                    container[key] = _default(annotation, container, key)
                container, annotation = container[key], inner
            if not isinstance(container, (dict, list)):
                raise ConfigError(dotted(path), f"{dotted(here)} is {container!r}, which has no parts", where=origin)
        if isinstance(container, list):
            container[_index(container, path)] = copy.deepcopy(value)
            self._mark(path[:-1], container, origin, {}) if is_leaf(container) else self._mark(path, value, origin, {})
        else:
            self._lay(annotation, container, {str(path[-1]): value}, path[:-1], origin, {})

    def _lay(self, annotation: Any, base: dict[str, Any], over: Mapping[str, Any], path: Key, origin: str,
             lines: Mapping[Key, int]) -> None:
        tag = tag_of(annotation)
        if tag and tag[0] in over and over[tag[0]] != base.get(tag[0], tag[1]):
            base.clear()
            self._forget(path)
        if over:
            self.origins.pop(path, None)  # an empty section was a leaf until now
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, Mapping) and isinstance(base.get(key), dict):
                self._lay(child_annotation(annotation, {**base, **over}, key), base[key], value, here, origin, lines)
            else:
                self._forget(here)
                base[key] = copy.deepcopy(value)
                self._mark(here, value, origin, lines)

    def _mark(self, path: Key, value: Any, origin: str, lines: Mapping[Key, int]) -> None:
        self.places[path] = f"{origin}:{lines[path]}" if path in lines else origin
        if is_leaf(value):
            self.origins[path] = origin
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, item in parts:
            self._mark((*path, key), item, origin, lines)

    def _forget(self, path: Key) -> None:
        for table in (self.origins, self.places):
            for known in [k for k in table if k[:len(path)] == path]:
                del table[known]


def apply_sets(layered: Layered, schema: type[Section], sets: Sequence[str]) -> list[ConfigError]:
    """Apply `a.b=value` in order, kinds of polymorphic sections first; returns what could not be applied."""
    problems: list[ConfigError] = []
    assignments: list[tuple[Key, Any]] = []
    for text in sets:
        name, equals, raw = text.partition("=")
        parts = tuple(int(p) if p.isdigit() else p for p in name.strip().split("."))
        if not equals or not all(str(p) for p in parts):
            problems.append(ConfigError("", f'"{text}" is no assignment; write --set key.subkey=value', where=SET))
            continue
        try:
            assignments.append((parts, parse_yaml(raw, f"{SET} {text}").values))
        except ConfigError as error:
            problems.append(error)
    ordered = sorted(assignments, key=lambda item: not _is_tag(schema, layered.values, item[0]))
    for path, value in ordered:
        try:
            layered.assign(schema, path, value, SET)
        except ConfigError as error:
            problems.append(error)
    return problems


def _is_tag(schema: type[Section], values: Any, path: Key) -> bool:
    annotation: Any = schema
    for part in path[:-1]:
        annotation = child_annotation(annotation, values, part)
        values = values.get(part, {}) if isinstance(values, Mapping) and isinstance(part, str) else {}
    tag = tag_of(annotation)
    return tag is not None and path[-1] == tag[0]


def _index(items: list[Any], path: Key) -> int:
    part = path[-1]
    if not isinstance(part, int) or part >= len(items):
        raise ConfigError(dotted(path), f"the list has {len(items)} items, numbered from 0", where=SET)
    return part


def _default(annotation: Any, values: Any, key: str) -> Any:
    """What an assignment below an absent key starts from: the default of a list, else an empty section."""
    section = section_class(annotation, values)
    info = fields_of(section).get(key) if section else None
    default = info.get_default(call_default_factory=True) if info and not info.is_required() else None
    return list(default) if isinstance(default, (list, tuple)) else {}


def unknown_key(schema: type[Section], section: type[Section] | None, key: str) -> str:
    """What to say about a key that does not exist: the nearest name in its section, else where the name does exist."""
    near = nearest(key, fields_of(section) if section else ())
    if not near:
        homes = [dotted(path) for path in _all_keys(schema, ()) if path[-1] == key]
        near = f' (did you mean "{homes[0]}"?)' if homes else ""
    return f"is no key of this file{near}" if section is schema else f"is no key of this section{near}"


def _all_keys(section: type[Section], path: tuple[str, ...]) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for key, info in fields_of(section).items():
        keys.append((*path, key))
        inner = section_class(info.annotation, {})
        if inner is not None:
            keys += _all_keys(inner, (*path, key))
    return keys
