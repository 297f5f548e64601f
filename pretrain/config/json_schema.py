"""JSON schema of a config file, for editors (`# yaml-language-server: $schema=...`)."""

from __future__ import annotations

from typing import Any

from pretrain.config.model import ModelConfig, Section
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.registry import resolve
from pretrain.config.run import RunConfig
from pretrain.config.sections import TAGS
from pretrain.config.source import SourceConfig

_EXTENDS = {"description": "preset names or files (relative to this one) that this config starts from; later ones win",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_REF = "#/$defs/{model}"


def config_json_schema() -> dict[str, Any]:
    """Schema (draft 2020-12) of a file that `load_run_config` reads.

    Sections with several kinds (model, objective, sources) are `oneOf` over the registry. A file that extends another
    may leave out anything, so keys are required only at the top of a file that extends nothing.
    """
    schema = RunConfig.model_json_schema(ref_template=_REF)
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    required = schema.pop("required", [])
    for base in (ModelConfig, ObjectiveConfig, SourceConfig):
        definitions[base.__name__] = _kinds(base, definitions)
    for definition in definitions.values():
        definition.pop("required", None)
    schema["properties"]["extends"] = _EXTENDS
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema,
            "if": {"not": {"required": ["extends"]}}, "then": {"required": required}}


def _kinds(base: type[Section], definitions: dict[str, Any]) -> dict[str, Any]:
    """`oneOf` over the classes of a polymorphic section, and a branch for a section that inherits its kind."""
    tag, table, _ = TAGS[base]
    branches: list[dict[str, Any]] = []
    for name in sorted(table):
        own = resolve(table, name, tag).model_json_schema(ref_template=_REF)
        definitions.update({key: value for key, value in own.pop("$defs", {}).items() if key not in definitions})
        own.setdefault("properties", {})[tag] = {**own["properties"].get(tag, {}), "const": name}
        branches.append({**own, "required": [tag]})
    inherits = {"title": f"{tag} from the config that this one extends, or the default", "type": "object",
                "not": {"required": [tag]}}
    return {"description": (base.__doc__ or "").strip(), "oneOf": [*branches, inherits]}
