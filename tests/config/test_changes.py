from pathlib import Path

import pytest

from pretrain.config import changes
from pretrain.config.load import diff_configs, load_run_config
from pretrain.config.registry import MODEL_SCHEMAS, OBJECTIVE_SCHEMAS, SOURCE_SCHEMAS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def diff(base, *sets):
    return diff_configs(load_run_config(base), load_run_config(base, sets)), load_run_config(base, sets).config


def test_every_key_of_the_schema_has_a_rule_and_every_rule_a_key(base):
    """A key that is added to RunConfig is added to the table, or to its schema's `changeable`."""
    config = load_run_config(base).config
    keys = set(changes.leaf_keys())
    polymorphic = {"model", "objective", "data.source"}
    without = [key for key in keys - polymorphic if key not in changes.TABLE]
    assert without == []
    assert set(changes.TABLE) - keys == {"objective.name"}
    for key in keys - polymorphic:
        assert changes.rule_of(key, config)


@pytest.mark.parametrize("table", [MODEL_SCHEMAS, OBJECTIVE_SCHEMAS, SOURCE_SCHEMAS])
def test_what_a_schema_calls_changeable_is_a_key_of_it(table):
    from pretrain.config.registry import resolve
    for kind in table:
        schema = resolve(table, kind, "")
        own = getattr(schema, "changeable", frozenset()) - {"path", "verify"}
        assert own <= {key.rpartition(".")[2] for key in changes.leaf_keys(schema, f"{kind}.")}, kind


def test_the_page_shows_the_table():
    assert changes.table() in (DOCS / "durability.md").read_text()


@pytest.mark.parametrize(("change", "rule"), [
    ("model.width=8", changes.MODEL), ("seed=3", changes.ORDER), ("data.seq_len=64", changes.ORDER),
    ("data.source.split=val", changes.ORDER), ("data.source.path=elsewhere", changes.FREE),
    ("data.source.verify=off", changes.FREE), ("data.document_masking=false", changes.MASKING),
    ("objective.z_loss=0.1", changes.TERMS), ("optim.betas=[0.5, 0.5]", changes.NEXT),
    ("engine.deepspeed={wall_clock_breakdown: true}", changes.ROUNDING),
    ("checkpoint.mirror={path: there}", changes.FREE), ("data.validation={path: a}", changes.JUDGED),
])
def test_a_change_finds_its_rule(base, change, rule):
    found, config = diff(base, change)
    assert {changes.rule_of(key, config) for key, *_ in found} == {rule}


def test_sources_inside_a_mixture_have_the_rules_of_their_kind(write, base):
    mixture = "data: {source: {kind: mixture, parts: [{weight: 1, source: {path: a}}, {weight: 2, source: {path: b}}]}}"
    path = write(f"extends: base.yaml\n{mixture}\n")
    found, config = diff(path, "data.source.parts.1.source.path=c")
    assert [changes.rule_of(key, config) for key, *_ in found] == [changes.FREE]
    found, config = diff(path, "data.source.parts.1.weight=3")
    assert [changes.rule_of(key, config) for key, *_ in found] == [changes.ORDER]


def test_what_may_not_change_is_one_line_with_values_and_cure(base):
    found, config = diff(base, "model.width=8", "seed=3", "optim.lr=0.1", "launch.nproc=2")
    line = changes.refusal(changes.refused(found, config))
    assert line == ("the config is of other data, order or batch size (seed is 42 in the run, 3 here); another model "
                    "(model.width is 16 in the run, 8 here); set it back, give the run another name, or start it with "
                    "train.init_from")
    found, config = diff(base, "seed=3")
    assert changes.refusal(changes.refused(found, config)).endswith("branch off: `pretrain train CONFIG --branch NAME`")


def test_a_branch_may_change_all_but_the_model(base):
    found, config = diff(base, "model.width=8", "seed=3", "data.document_masking=false", "optim.lr=0.1")
    assert [key for _, (key, *_) in changes.refused(found, config, branch=True)] == ["model.width"]
    assert list(changes.consequences(found[1:], config, branch=True)) == [
        "data.document_masking: documents are seen otherwise from here on", "optim.lr: holds from the next update on"]


def test_a_key_of_the_order_that_is_left_out_on_one_side_is_for_the_data_to_judge(base):
    found, config = diff(base, "batch.global_batch_size=8", "data.stride=512")
    assert [key for key, *_ in found] == ["data.stride", "batch.global_batch_size"]
    assert changes.refused(found, config) == []


def test_consequences_are_said_once_for_all_keys_that_share_them(base):
    found, config = diff(base, "optim.lr=0.1", "optim.eps=1e-6", "schedule.warmup=null", "monitor.tensorboard=false")
    assert list(changes.consequences(found, config)) == [
        "optim.lr, optim.eps: holds from the next update on",
        "schedule.warmup: the learning rate is computed anew for this step and may jump"]
