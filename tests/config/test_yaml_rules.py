import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.yaml_io import inline, parse_yaml, read_yaml
from pretrain.errors import ConfigError

QUIET = settings(deadline=None, derandomize=True, max_examples=200)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-10**20, 10**20), st.floats(allow_nan=False), st.text(max_size=12),
    st.sampled_from(["on", "off", "yes", "no", "null", "~", "3e-4", "1e5", "0x1F", "010", "1:30", "2026-01-01", "1_000",
                     "=", "<<", ".inf", "-", "#x", "true", "", " x ", "a: b", "1."]))
values = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=8)


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1E5", 1e5), ("1e+5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2.5e-3", -2.5e-3), ("1_000.5", 1000.5),
    ("on", "on"), ("off", "off"), ("yes", "yes"), ("n", "n"), ("true", True), ("False", False),
    ("010", 10), ("0x10", 16), ("1_000_000", 1_000_000), ("-7", -7), ("1:30", "1:30"), ("2026-01-02", "2026-01-02"),
    ("null", None), ("~", None), ("", None), ("1e", "1e"), ("e5", "e5"), ("-.inf", -math.inf),
])
def test_plain_scalars_mean_what_they_look_like(text, value):
    parsed = parse_yaml(f"a: {text}\n", "x").values["a"]
    assert parsed == value
    assert type(parsed) is type(value)


@QUIET
@given(values)
def test_a_value_reads_back_equal_from_one_line(value):
    text = inline(value)
    assert "\n" not in text
    assert parse_yaml(text, "x").values == value


@QUIET
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.one_of(st.integers(), st.text("xyz ", max_size=5))))
def test_agrees_with_pyyaml_where_the_versions_of_yaml_agree(mapping):
    text = yaml.safe_dump(mapping)
    assert parse_yaml(text, "x").values == yaml.safe_load(text)


def test_lines_are_those_of_the_file():
    document = parse_yaml("a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2}\n", "x")
    assert document.lines[("a",)] == 1
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 1)] == 6
    assert document.lines[("a", "c", 1, "d")] == 6


@pytest.mark.parametrize(("text", "message"), [
    ("a: 1\nb: [1, 2\nc: 3\n", "f.yaml:3: "),
    ("a: 1\nb:\n  c: 1\n  c: 2\n", 'f.yaml:4: key "c" is given twice'),
    ("a: 1\n\ta: 2\n", "f.yaml:2: "),
    ("5: 1\n", "f.yaml:1: key 5 is not text; write it in quotes"),
    ("a: !!python/object:os.system x\n", "f.yaml:1: "),
    ("a: &x\n  b: *x\n", "f.yaml: an anchor contains itself"),
    ("a: 1\n---\nb: 2\n", "f.yaml:2: "),
])
def test_what_is_no_config_is_named_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"a: \xff")
    for name, message in [("none", "no such file"), (".", "is a folder"), ("latin", "is not UTF-8 text (byte 3)")]:
        with pytest.raises(ConfigError, match=f"^{name}: {message.replace('(', '.').replace(')', '.')}"):
            read_yaml(tmp_path / name, name)


def test_nested_aliases_cost_no_more_than_their_text():
    text = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    assert len(parse_yaml(text, "x").lines) < 100
