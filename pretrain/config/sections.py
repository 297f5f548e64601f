"""Walking sections: which fields a section has, which class a polymorphic section is, plain values of an instance."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

from pretrain.config.interval import Interval
from pretrain.config.model import ModelConfig, Section
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.registry import MODEL_SCHEMAS, OBJECTIVE_SCHEMAS, SOURCE_SCHEMAS, resolve
from pretrain.config.source import SourceConfig
from pretrain.errors import ConfigError

TAGS: dict[type[Section], tuple[str, dict[str, str], str | None]] = {
    ModelConfig: ("family", MODEL_SCHEMAS, None),
    ObjectiveConfig: ("name", OBJECTIVE_SCHEMAS, None),
    SourceConfig: ("kind", SOURCE_SCHEMAS, "shards"),
}
"""Polymorphic sections: base class -> (key that picks the class, table of classes, what a missing key means)."""


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields by the key that a file uses (the alias, where there is one)."""
    return {key_of(name, info): info for name, info in section.model_fields.items()}


def key_of(name: str, info: FieldInfo) -> str:
    """The key of a field in a file."""
    alias = info.validation_alias or info.alias
    return alias if isinstance(alias, str) else name


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None: `A | B | None` -> [A, B]."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) if arg is not type(None) for m in members(arg)]
    return [annotation]


def tag_of(annotation: Any) -> tuple[str, str | None] | None:
    """(tag key, value of a missing tag) of a polymorphic section: one in `TAGS` or a union told apart by a Literal."""
    classes = [m for m in members(annotation) if _is_section(m)]
    if len(classes) == 1 and classes[0] in TAGS:
        key, _, missing = TAGS[classes[0]]
        return key, missing
    if len(classes) > 1:
        for key in fields_of(classes[0]):
            if all(_literals(c, key) for c in classes):
                return key, None
    return None


def section_class(annotation: Any, value: Any) -> type[Section] | None:
    """The class that would validate `value` under this annotation, None where it is no (known) section."""
    classes: list[type[Section]] = [m for m in members(annotation) if _is_section(m)]
    if not classes:
        return None
    tag = tag_of(annotation)
    given = value.get(tag[0], tag[1]) if tag and isinstance(value, Mapping) else None
    if len(classes) == 1 and classes[0] in TAGS:
        table = TAGS[classes[0]][1]
        try:
            found: type[Section] = resolve(table, str(given), "")
        except ConfigError:
            return None
        return found
    if tag and len(classes) > 1:
        return next((c for c in classes if given in _literals(c, tag[0])), None)
    return classes[0]


def item_annotation(annotation: Any) -> Any:
    """Annotation of the items of a list or tuple, Any where it names none."""
    for member in members(annotation):
        args = typing.get_args(member)
        if isinstance(typing.get_origin(member), type) and issubclass(typing.get_origin(member), Sequence) and args:
            return args[0]
    return Any


def child_annotation(annotation: Any, value: Any, part: str | int) -> Any:
    """Annotation of `value[part]`; Any where the schema says nothing about it."""
    if isinstance(part, int):
        return item_annotation(annotation)
    section = section_class(annotation, value)
    info = fields_of(section).get(part) if section else None
    return info.annotation if info else Any


def plain(value: Any) -> Any:
    """An instance as dicts, lists and scalars: what a file would say."""
    if isinstance(value, Section):
        infos = type(value).model_fields
        return {key_of(name, info): plain(getattr(value, name)) for name, info in infos.items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (Interval, PurePath)):
        return str(value)
    return value.value if isinstance(value, Enum) else value


def is_leaf(value: Any) -> bool:
    """Whether a plain value has no parts of its own: a scalar, an empty section, a list without sections."""
    if isinstance(value, list):
        return not any(isinstance(item, Mapping) for item in value)
    return not (isinstance(value, Mapping) and value)


def flatten(values: Any, prefix: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    """Leaves by path."""
    if is_leaf(values):
        return {prefix: values}
    items: list[tuple[str | int, Any]] = list(values.items() if isinstance(values, Mapping) else enumerate(values))
    leaves: dict[tuple[str | int, ...], Any] = {}
    for key, item in items:
        leaves |= flatten(item, (*prefix, key))
    return leaves


def dotted(path: Sequence[str | int]) -> str:
    """`("a", 0, "b")` -> `"a.0.b"`."""
    return ".".join(str(part) for part in path)


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Section)


def _literals(section: type[Section], key: str) -> tuple[Any, ...]:
    info = fields_of(section).get(key)
    return typing.get_args(info.annotation) if info and typing.get_origin(info.annotation) is Literal else ()
