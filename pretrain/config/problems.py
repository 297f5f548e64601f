"""Pydantic's findings in the project's words: `FILE:LINE: key = value: rule; what the key is`."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pretrain.config.merge import Layered, unknown_key
from pretrain.config.model import Section
from pretrain.config.sections import child_annotation, dotted, fields_of, flatten, members, section_class, tag_of
from pretrain.config.yaml_io import Key, inline
from pretrain.errors import ConfigError, ConfigErrors

_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "str": "text",
          "list": "a list", "tuple": "a list", "dict": "a section (key: value)", "model": "a section (key: value)"}
_RANGES = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def describe(error: ValidationError, schema: type[Section], layered: Layered, where: str) -> list[ConfigError]:
    """Every finding of `error`, nested ones included; `where` is named for values that no file gave."""
    problems: list[ConfigError] = []
    for detail in error.errors(include_url=False):
        problems += _describe(detail, (), schema, layered, where)
    return problems


def _describe(detail: ErrorDetails, prefix: Key, schema: type[Section], layered: Layered, where: str
              ) -> list[ConfigError]:
    loc = (*prefix, *detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):
        return [p for inner in cause.errors(include_url=False) for p in _describe(inner, loc, schema, layered, where)]
    if isinstance(cause, ConfigErrors):
        return [_placed(problem, layered, where) for problem in cause.problems]
    path, owner, info = locate(schema, layered.values, loc)
    if isinstance(cause, ConfigError):
        tag = tag_of(info.annotation) if info else None
        if tag and cause.key.rpartition(".")[2] == tag[0]:  # its raiser does not know which of several sections it is
            cause = ConfigError(dotted((*path, tag[0])), cause.message)
        return [_placed(cause, layered, where)]
    place = layered.place(path) or where
    if detail["type"] == "extra_forbidden":
        return [ConfigError(dotted(path), unknown_key(schema, owner, str(path[-1])), where=place)]
    help_text = f"; {info.description}" if info and info.description else ""
    if detail["type"] == "missing" and isinstance(loc[-1], int):
        rule = f"must have at least {loc[-1] + 1} items"
        return [ConfigError(dotted(path), rule + help_text, where=place, value=_shown(detail["input"]))]
    if detail["type"] == "missing":
        return [ConfigError(dotted(path), f"is missing{help_text}", where=where)]
    rule = str(cause) if cause is not None else _rule(detail, info)
    return [ConfigError(dotted(path), rule + help_text, where=place, value=_shown(detail["input"]))]


def _placed(problem: ConfigError, layered: Layered, where: str) -> ConfigError:
    key = tuple(int(part) if part.isdigit() else part for part in problem.key.split("."))
    place = layered.place(key) or where
    return ConfigError(problem.key, problem.message, where=place, value=problem.value)


def _shown(value: Any) -> str:
    try:
        text = inline(value)
    except Exception:  # an object that YAML cannot write: only from Python callers
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def locate(schema: type[Section], values: Any, loc: Sequence[str | int]) -> tuple[Key, type[Section] | None,
                                                                                 FieldInfo | None]:
    """(path in the file, class of the section around it, field) of pydantic's `loc`, which also names union members."""
    annotation: Any = schema
    path: list[str | int] = []
    owner: type[Section] | None = None
    info: FieldInfo | None = None
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        is_key = isinstance(values, dict) and (part in values or (last and isinstance(part, str)))
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not (is_key or is_index):
            continue
        owner = section_class(annotation, values)
        info = fields_of(owner).get(str(part)) if owner else None
        annotation = child_annotation(annotation, values, part)
        values = values.get(part) if isinstance(values, dict) else values[part]
        path.append(part)
    return tuple(path), owner, info


def _rule(detail: ErrorDetails, info: FieldInfo | None) -> str:
    """What the value has to be."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _RANGES:
        return "must be " + (_range(info) or next(f"{_WORDS[k]} {v}" for k, v in context.items() if k in _WORDS))
    if kind == "literal_error":
        return "must be " + _choices(info, str(context["expected"]))
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        return f"must have {bound} {context.get('min_length', context.get('max_length'))} items"
    if kind in ("string_too_short", "string_too_long"):
        bound = "at least" if kind == "string_too_short" else "at most"
        return f"must have {bound} {context.get('min_length', context.get('max_length'))} characters"
    if kind == "finite_number":
        return "must be finite"
    if kind == "int_from_float":
        return "must be a whole number"
    word = _TYPES.get(kind.split("_")[0]) if kind.endswith(("_type", "_parsing", "_attributes_type")) else None
    if word:
        return f"must be {word}" + (f", {bounds}" if (bounds := _range(info)) else "")
    return re.sub(r"^Input should be", "must be", detail["msg"])


def _range(info: FieldInfo | None) -> str:
    """The bounds of a field in words, `above 0 and at most 10`."""
    parts = [f"{_WORDS[name]} {getattr(bound, name)}" for bound in (info.metadata if info else ())
             for name in _WORDS if getattr(bound, name, None) is not None]
    return " and ".join(parts)


def _choices(info: FieldInfo | None, fallback: str) -> str:
    options = [o for m in members(info.annotation) if typing.get_origin(m) is Literal for o in typing.get_args(m)] \
        if info else []
    return "one of " + ", ".join(inline(o) for o in options) if options else fallback


def booleans_as_numbers(schema: type[Section], layered: Layered, where: str) -> list[ConfigError]:
    """`true` and `false` where a number stands: pydantic would take them for 1 and 0."""
    problems = []
    for path, value in flatten(layered.values).items():
        if not isinstance(value, bool):
            continue
        annotation: Any = schema
        values: Any = layered.values
        for part in path:
            annotation, values = child_annotation(annotation, values, part), values[part]
        allowed = members(annotation)
        if not {bool, Any} & set(allowed) and {int, float} & set(allowed):
            rule = "must be a number" if float in allowed else "must be a whole number"
            problems.append(ConfigError(dotted(path), rule, where=layered.place(path) or where, value=_shown(value)))
    return problems


def collect(check: Callable[[], Any], schema: type[Section], layered: Layered, where: str
            ) -> tuple[Any, list[ConfigError]]:
    """(result of `check`, its problems): validation that reports instead of raising."""
    try:
        return check(), []
    except ValidationError as error:
        return None, describe(error, schema, layered, where)
    except ConfigError as error:
        return None, [_placed(p, layered, where) for p in getattr(error, "problems", (error,))]
