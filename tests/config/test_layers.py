"""Files laid over files, and --set over both."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.load import LoadedConfig, diff_configs, dump_yaml, load_run_config
from pretrain.config.merge import Layered, apply_sets
from pretrain.config.model import Section
from pretrain.errors import ConfigError
from tests.presets import presets

QUIET = settings(deadline=None, derandomize=True, max_examples=100)
keys = st.sampled_from("abc")
trees = st.recursive(st.integers(0, 9), lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=8)
sections = st.dictionaries(keys, trees, max_size=3)


class Anything(Section):
    """No fields: the layers below know nothing of the schema."""


def slow_merge(base, over):
    """The reference: recursive merge of plain dicts."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = slow_merge(result[key], value) if both else copy.deepcopy(value)
    return result


def leaves(tree, path=()):
    if isinstance(tree, dict) and tree:
        return {k: v for key, item in tree.items() for k, v in leaves(item, (*path, key)).items()}
    return {path: tree}


@QUIET
@given(st.lists(sections, max_size=4))
def test_layers_merge_like_the_reference_and_every_leaf_knows_the_last_file_that_gave_it(files):
    layered, expected = Layered(), {}
    for number, file in enumerate(files):
        untouched = copy.deepcopy(file)
        layered.overlay(Anything, file, f"f{number}", {})
        expected = slow_merge(expected, file)
        assert file == untouched
    assert layered.values == expected
    for path, value in leaves(expected).items():
        if path:
            # The last file that speaks of this leaf gave it: no later one has anything at or above its path.
            giver = int(layered.origins[path].removeprefix("f"))
            assert leaves(files[giver]).get(path, value) == value
            for later in files[giver + 1:]:
                assert not any(other[:len(path)] == path for other, item in leaves(later).items() if item != {})
    assert set(layered.origins) == {path for path in leaves(expected) if path}


@QUIET
@given(sections, st.lists(st.tuples(st.lists(keys, min_size=1, max_size=3), st.integers(0, 9)), max_size=4))
def test_assignments_equal_files_that_say_the_same(start, assignments):
    layered = Layered()
    layered.overlay(Anything, start, "file", {})
    problems = apply_sets(layered, Anything, [f"{'.'.join(path)}={value}" for path, value in assignments])
    expected, refused = copy.deepcopy(start), 0
    for path, value in assignments:
        inner = expected
        for part in path[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = value
        else:
            refused += 1
    assert len(problems) == refused
    if not refused:
        assert layered.values == expected


def test_the_file_wins_over_what_it_extends_and_the_last_parent_over_the_first(write, base):
    write("optim: {lr: 0.1, weight_decay: 0.2, grad_clip: 0.3}\n", "one.yaml")
    write("optim: {lr: 0.4, weight_decay: 0.5}\n", "sub/two.yaml")
    path = write("extends: [base.yaml, one.yaml, sub/two.yaml]\noptim: {lr: 0.7}\n")
    loaded = load_run_config(path, ["optim.eps=1e-9"])
    optim = loaded.config.optim
    assert (optim.lr, optim.weight_decay, optim.grad_clip, optim.eps) == (0.7, 0.5, 0.3, 1e-9)
    assert {key: loaded.origins[f"optim.{key}"] for key in ("lr", "weight_decay", "grad_clip", "eps", "betas")} == {
        "lr": "run.yaml", "weight_decay": "sub/two.yaml", "grad_clip": "one.yaml", "eps": "--set", "betas": "default"}


def test_a_path_is_relative_to_the_file_that_names_it(write, base):
    write("extends: ../base.yaml\noptim: {lr: 0.5}\n", "deep/middle.yaml")
    assert load_run_config(write("extends: deep/middle.yaml\n")).config.optim.lr == 0.5


def test_a_preset_can_be_extended_by_name(write):
    loaded = load_run_config(write("extends: demo\nseed: 7\n"))
    assert loaded.config.seed == 7
    assert loaded.origins["model.hidden_size"] == "configs/presets/demo.yaml"
    assert loaded.config.model == load_run_config("demo").config.model


@pytest.mark.parametrize("how", ["file", "set"])
def test_another_family_replaces_the_inherited_model(write, base, how):
    if how == "file":
        loaded = load_run_config(write("extends: base.yaml\nmodel: {family: other}\n"))
    else:
        loaded = load_run_config(base, ["model.family=other"])
    assert (loaded.config.model.family, loaded.config.model.width) == ("other", 8)
    assert loaded.origins["model.width"] == "default"


def test_the_same_family_merges(write, base):
    assert load_run_config(write("extends: base.yaml\nmodel: {family: toy, depth: 5}\n")).config.model.width == 16


def test_the_kind_of_a_section_is_set_before_its_keys_in_any_order(base):
    for sets in (["model.height=9", "model.family=other"], ["model.family=other", "model.height=9"]):
        assert load_run_config(base, sets).config.model.height == 9


def test_another_source_replaces_the_inherited_one(base):
    loaded = load_run_config(base, ["data.source.kind=synthetic"])
    assert loaded.config.data.source.kind == "synthetic"
    assert "data.source.path" not in loaded.origins


def test_parts_of_lists_can_be_set(write, base):
    assert load_run_config(base, ["optim.betas.1=0.99"]).config.optim.betas == (0.9, 0.99)
    path = write("""
        extends: base.yaml
        data:
          source:
            kind: mixture
            parts: [{weight: 1, source: {path: a}}, {weight: 2, source: {path: b}}]
        """)
    loaded = load_run_config(path, ["data.source.parts.1.weight=5"])
    assert [part.weight for part in loaded.config.data.source.parts] == [1, 5]
    assert loaded.origins["data.source.parts.1.weight"] == "--set"
    assert loaded.origins["data.source.parts.0.weight"] == "run.yaml"
    assert loaded.origins["data.source.parts.0.source.split"] == "default"


@pytest.mark.parametrize("name", presets())
def test_a_dump_loads_to_an_equal_config(name, write):
    loaded = load_run_config(name, ["optim.lr=1.5e-4", "train.length=3M tokens", "engine.zero3_init=on",
                                    "engine.deepspeed={aio: {b: [1, 2.5, off]}, timers: {}}", "eval.every=null",
                                    "train.patience=null"])
    for with_origins in (True, False):
        again = load_run_config(write(dump_yaml(loaded, with_origins), "again.yaml"))
        assert again.config == loaded.config
        assert again.values == loaded.values
    assert load_run_config(write(dump_yaml(loaded.config), "plain.yaml")).config == loaded.config
    assert "# --set" in dump_yaml(loaded)
    assert "#" not in dump_yaml(loaded, with_origins=False)


@QUIET
@given(lr=st.floats(1e-9, 10), betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
       length=st.integers(1, 10**12), text=st.text(min_size=1, max_size=20), seed=st.integers(0, 2**63 - 1))
def test_any_value_survives_a_dump(tmp_path_factory, lr, betas, length, text, seed):
    folder = tmp_path_factory.mktemp("dump")
    config = load_run_config("demo").config
    config = config.model_copy(update={
        "seed": seed, "runs_dir": text,
        "optim": config.optim.model_copy(update={"lr": lr, "betas": betas}),
        "train": config.train.model_validate({"length": f"{length} samples"})})
    path = folder / "x.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_run_config(path).config == config


def test_every_value_has_an_origin_and_a_diff_names_exactly_what_differs(base):
    left = load_run_config(base)
    right = load_run_config(base, ["optim.lr=0.5", "model.depth=7"])
    assert isinstance(left, LoadedConfig)
    assert diff_configs(left, left) == []
    assert sorted(diff_configs(left, right)) == [("model.depth", 2, 7), ("optim.lr", 3e-4, 0.5)]
    differing = {key for key, *_ in diff_configs(left, load_run_config(base, ["model.family=other"]))}
    assert differing == {"model.family", "model.width", "model.height"}


def test_a_circle_of_extends_is_named(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: sub/c.yaml\n", "b.yaml")
    write("extends: ../a.yaml\n", "sub/c.yaml")
    with pytest.raises(ConfigError, match=r"extends: goes in a circle: a\.yaml -> b\.yaml -> sub/c\.yaml -> a\.yaml"):
        load_run_config("a.yaml")


def test_two_children_of_one_parent_are_no_circle(write, base):
    write("extends: base.yaml\n", "one.yaml")
    write("extends: base.yaml\n", "two.yaml")
    assert load_run_config(write("extends: [one.yaml, two.yaml]\n")).config.model.width == 16
