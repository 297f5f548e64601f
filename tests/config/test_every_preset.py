"""Walks configs/presets and the JSON schema that describes such files."""

import re

import pytest
import yaml

from pretrain.config.json_schema import config_json_schema
from pretrain.config.load import load_run_config
from pretrain.config.presets import configs_dir, display_path, list_presets, preset_path
from pretrain.config.yaml_io import read_yaml
from pretrain.errors import UserError

FILES = sorted((configs_dir() / "presets").glob("*.yaml"), key=lambda path: path.stem)


def test_presets_are_the_files_of_the_folder():
    assert [path.stem for path in FILES] == list_presets()
    assert {"demo", "baseline-27m", "baseline-124m", "baseline-350m", "baseline-1b"} <= set(list_presets())
    assert display_path(preset_path("demo")) == "configs/presets/demo.yaml"
    for name in ("../deepspeed/zero2", "", "demo/../demo"):
        with pytest.raises(UserError, match="no preset"):
            preset_path(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_preset_is_a_whole_run_that_says_what_it_is(path):
    loaded = load_run_config(path)
    assert loaded.config.name == path.stem
    assert path.read_text().startswith("# ")
    loaded.config.batch.resolve(loaded.config.launch.nproc)
    count = loaded.config.model.parameter_count()
    only_evaluated = "only evaluated" in path.read_text() or path.stem.startswith("afrb-baseline")
    assert count.total > 0
    assert count.trainable == 0 if only_evaluated else 0 < count.trainable <= count.total


class Invalid(Exception):
    """Where and why a value does not follow a schema."""


def validate(value, schema, root, at="$"):
    """The part of JSON schema that ours uses, written the slow way."""
    known = {"type", "properties", "additionalProperties", "required", "oneOf", "anyOf", "not", "const", "enum",
             "items", "prefixItems", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum",
             "exclusiveMaximum",
             "pattern", "minLength", "$ref", "if", "then", "default", "description", "title", "$defs", "$schema",
             "examples"}
    assert set(schema) <= known, at

    def holds(inner, item=value):
        try:
            validate(item, inner, root, at)
        except Invalid:
            return False
        return True

    def need(condition, why):
        if not condition:
            raise Invalid(f"{at} = {value!r}: {why}")

    if "$ref" in schema:
        validate(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "const" in schema:
        need(value == schema["const"], "const")
    if "enum" in schema:
        need(value in schema["enum"], "enum")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    types = {"object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
             "integer": number and value == int(value), "number": number, "boolean": isinstance(value, bool),
             "null": value is None}
    if "type" in schema:
        need(types[schema["type"]], schema["type"])
    if number:
        need(value >= schema.get("minimum", value) and value <= schema.get("maximum", value), "range")
        need("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"], "range")
        need("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"], "range")
    if isinstance(value, str) and "pattern" in schema:
        need(re.search(schema["pattern"], value), "pattern")
    if isinstance(value, list):
        need(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), "length")
        for index, item in enumerate(value):
            prefix = schema.get("prefixItems", [])
            validate(item, prefix[index] if index < len(prefix) else schema.get("items", {}), root, f"{at}.{index}")
    if isinstance(value, dict):
        need(set(schema.get("required", ())) <= set(value), "required")
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key)
            if inner is None and schema.get("additionalProperties") is False:
                raise Invalid(f"{at}.{key}: unknown")
            validate(item, inner or {}, root, f"{at}.{key}")
    if "anyOf" in schema:
        need(any(holds(inner) for inner in schema["anyOf"]), "anyOf")
    if "oneOf" in schema:
        need(sum(holds(inner) for inner in schema["oneOf"]) == 1, "oneOf")
    if "not" in schema:
        need(not holds(schema["not"]), "not")
    if "if" in schema and holds(schema["if"]):
        validate(value, schema["then"], root, at)


SCHEMA = config_json_schema()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_json_schema_takes_every_preset_as_it_stands_and_resolved(path):
    validate(read_yaml(path, "x").values, SCHEMA, SCHEMA)
    validate(load_run_config(path).values, SCHEMA, SCHEMA)


@pytest.mark.parametrize("text", [
    "{}", "seed: x", "extends: demo\nsede: 1", "extends: demo\nmodel: {family: nonsense}", "extends: 5",
    "extends: demo\nmodel: {family: baseline, widht: 3}", "extends: demo\ntrain: {length: 10}",
    "extends: demo\ntrain: {length: 10 stps}", "extends: demo\noptim: {lr: 40}",
    "extends: demo\nengine: {zero_stage: 5}",
    "extends: demo\ndata: {source: {kind: shards, pth: x}}",
    "extends: demo\ndata: {source: {kind: mixture, parts: [{weight: 1, source: {kind: nonsense}}]}}"])
def test_the_json_schema_refuses_what_the_loader_refuses(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load_run_config(path)
    with pytest.raises(Invalid):
        validate(yaml.safe_load(text), SCHEMA, SCHEMA)


@pytest.mark.parametrize("text", ["extends: demo", "extends: [demo]\nmodel: {hidden_size: 96}",
                                  "extends: demo\ndata: {source: {path: y}}\neval: {every: null}"])
def test_the_json_schema_takes_files_that_extend(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    load_run_config(path)
    validate(yaml.safe_load(text), SCHEMA, SCHEMA)


def test_presets_of_a_wheel_and_an_installation_without_any(tmp_path, monkeypatch):
    from pretrain.config import presets
    package = tmp_path / "site-packages" / "pretrain"
    monkeypatch.setattr(presets, "_PACKAGE", package)
    with pytest.raises(UserError, match="the installation is incomplete"):
        presets.configs_dir()
    for folder in (package.parent / "configs" / "presets", package / "_configs" / "presets"):
        folder.mkdir(parents=True)  # somebody else's `configs` beside the package is not ours
    (package / "_configs" / "presets" / "mine.yaml").write_text("seed: 1\n")
    assert presets.configs_dir() == package / "_configs"
    assert presets.list_presets() == ["mine"]
    assert display_path(preset_path("mine")) == "configs/presets/mine.yaml"
