"""YAML as this project reads and writes it: the safe subset of YAML 1.2.

PyYAML follows YAML 1.1, in which `3e-4` is text, `on` and `off` are booleans, `1:30` is 90 and a key given twice is
silently the last one. Here floats are floats, only `true` and `false` are booleans, dates stay text, and a key given
twice is an error. The dumper shares the rules, so that what it writes reads back equal.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import ConfigError

Key = tuple[str | int, ...]
"""Path of a value inside a document."""

_RULES: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
                                r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", "-+.0123456789"),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", "<"),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the rules above."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dict; a key given twice or not text is an error at its line."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text; write it in quotes",
                                                        key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice in this section',
                                                        key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Decimal (a leading zero is no octal) or 0x."""
        text = str(node.value).replace("_", "")
        return int(text, 16 if "0x" in text else 10)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes exactly what `_Loader` would misread."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out: a reader should not have to follow anchors."""
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """Text that holds line breaks or other invisible characters is written with escapes, on one line."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), [*_first, *([""] if "null" in _tag else [])])
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """A parsed document and the line of each of its values."""

    values: Any
    lines: Mapping[Key, int] = field(default_factory=dict)


def parse_yaml(text: str, where: str) -> YamlDocument:
    """Parse one document. Raises ConfigError naming `where` and the line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        note = f" ({error.context})" if error.context and error.problem else ""
        raise ConfigError("", f"{error.problem or error.context}{note}", where=f"{where}{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError("", f"no YAML: {error}".splitlines()[0], where=where) from None
    finally:
        loader.dispose()
    lines: dict[Key, int] = {}
    if node is not None and _refers_to_itself(node, set()):
        raise ConfigError("", "an anchor contains itself", where=where)
    if node is not None:
        _collect_lines(node, (), lines, set())
    return YamlDocument(values, lines)


def read_yaml(path: Path, where: str) -> YamlDocument:
    """Parse a file; `where` is how messages name it. Raises ConfigError where it cannot be read or parsed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("", "no such file", where=where) from None
    except IsADirectoryError:
        raise ConfigError("", "is a folder; name the YAML file in it", where=where) from None
    except UnicodeDecodeError as error:
        raise ConfigError("", f"is not UTF-8 text (byte {error.start})", where=where) from None
    except OSError as error:
        raise ConfigError("", f"cannot be read: {error.strerror}", where=where) from None
    return parse_yaml(text, where)


def _children(node: yaml.Node) -> list[tuple[str | int, int, yaml.Node]]:
    """(key or index, line, value node) of a section or list."""
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(index, value.start_mark.line + 1, value) for index, value in enumerate(node.value)]
    return []


def _refers_to_itself(node: yaml.Node, above: set[int]) -> bool:
    return id(node) in above or any(_refers_to_itself(child, above | {id(node)}) for _, _, child in _children(node))


def _collect_lines(node: yaml.Node, path: Key, lines: dict[Key, int], seen: set[int]) -> None:
    """Lines of all values below `node`; what an alias repeats keeps the line of the alias."""
    if id(node) in seen:
        return
    seen.add(id(node))
    for key, line, child in _children(node):
        lines[(*path, key)] = line
        _collect_lines(child, (*path, key), lines, seen)


def inline(value: Any) -> str:
    """A value on one line, as YAML that reads back equal."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True, sort_keys=False)
    return str(text).removesuffix("\n").removesuffix("\n...")
