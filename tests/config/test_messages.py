"""What is said about bad input: one line each, naming place, key, value and cure; never pydantic's own words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from pretrain.config.load import load_run_config, load_yaml_model
from pretrain.config.model import Section
from pretrain.config.run import RunConfig
from pretrain.config.sections import fields_of
from pretrain.errors import ConfigErrors, ExitCode, UserError


def complaints(target, sets=()):
    with pytest.raises(ConfigErrors) as caught:
        load_run_config(target, sets)
    assert caught.value.code == ExitCode.USER
    text = str(caught.value)
    for foreign in ("Input should be", "pydantic", "errors.py", "validation error", "For further information"):
        assert foreign not in text
    assert all("\n" not in str(problem) for problem in caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("line", "message"), [
    # unknown keys, with the nearest right name
    ("optim: {wieght_decay: 0}", 'optim.wieght_decay: is no key of this section (did you mean "weight_decay"?)'),
    ("lr: 0.1", 'lr: is no key of this file (did you mean "optim.lr"?)'),
    ("data: {sequence_length: 5}", "data.sequence_length: is no key of this section"),
    ("model: {widht: 4}", 'model.widht: is no key of this section (did you mean "width"?)'),
    ("data: {source: {spilt: a}}", 'data.source.spilt: is no key of this section (did you mean "split"?)'),
    # wrong types
    ("seed: abc", "seed = abc: must be a whole number, at least 0 and below 9223372036854775808; seeds weights"),
    ("seed: 1.5", "seed = 1.5: must be a whole number"),
    ("optim: {lr: fast}", "optim.lr = fast: must be a number, above 0 and at most 10; peak learning rate"),
    ("engine: {compile: 3}", "engine.compile = 3: must be true or false; torch.compile the model"),
    ("name: [a]", "name = [a]: must be text; folder name under runs_dir"),
    ("optim: 3", "optim = 3: must be a section (key: value)"),
    ("optim: {betas: 0.9}", "optim.betas = 0.9: must be a list; decay of the first and second moment"),
    ("optim: {betas: [0.9]}", "optim.betas = [0.9]: must have at least 2 items; decay of the first"),
    ("optim: {betas: [0.9, x]}", "optim.betas.1 = x: must be a number"),
    ("optim: {betas: [0.9, 0.9, 0.9]}", "optim.betas = [0.9, 0.9, 0.9]: must have at most 2 items; decay"),
    ("optim: {lr: true}", "optim.lr = true: must be a number"),
    ("checkpoint: {keep_last: true}", "checkpoint.keep_last = true: must be a whole number"),
    ("seed: null", "seed = null: must be a whole number"),
    # out of range
    ("optim: {lr: 40}", "optim.lr = 40: must be above 0 and at most 10; peak learning rate"),
    ("optim: {lr: .inf}", "optim.lr = .inf: must be above 0 and at most 10"),
    ("optim: {betas: [0.9, 1.5]}", "optim.betas = [0.9, 1.5]: (0.9, 1.5) must both lie in [0, 1)"),
    ("engine: {zero_stage: 7}", "engine.zero_stage = 7: must be one of 0, 1, 2, 3; what is partitioned"),
    ("engine: {precision: bf17}", "engine.precision = bf17: must be one of auto, fp32, bf16, fp16"),
    ("name: a/b", "name = a/b: must match ^[A-Za-z0-9]"),
    ("data: {source: {kind: mixture, parts: []}}", "data.source.parts = []: must have at least 1 items"),
    # intervals
    ("train: {length: 10 stps}", 'train.length = 10 stps: "10 stps" is no interval: write a number and one of steps'),
    ("train: {length: 10}", 'train.length = 10: 10 is no interval: write a number and a unit, as "2000 steps"'),
    ("train: {length: 0 steps}", 'train.length = 0 steps: "0 steps": an interval is more than zero'),
    ("train: {length: 1.5 steps}", 'train.length = 1.5 steps: "1.5 steps": only epochs may be fractional'),
    # kinds
    ("model: {family: tyo}", 'model.family: "tyo" is not known (did you mean "toy"?); known: '),
    ("objective: {name: causal_ml}", 'objective.name: "causal_ml" is not known (did you mean "causal_lm"?)'),
    ("data: {source: {kind: shrads}}", 'data.source.kind: "shrads" is not known (did you mean "shards"?)'),
    ("data: {validation: {kind: shrads}}", 'data.validation.kind: "shrads" is not known'),
    # a batch that cannot be
    ("batch: {global_batch_size: 10, micro_batch_size: 4}",
     "batch.global_batch_size: 10 is no multiple of 4 (micro_batch_size 4 x gradient_accumulation_steps 1) for any "
     "number of ranks; use 8 or 12, or leave one of the three out"),
    ("batch: {global_batch_size: 3, micro_batch_size: 2, gradient_accumulation_steps: 4}",
     "batch.global_batch_size: 3 is no multiple of 8 (micro_batch_size 2 x gradient_accumulation_steps 4) for any "
     "number of ranks; use 8, or leave"),
    ("checkpoint: {mirror: {every: 2}}", "checkpoint.mirror.path: is missing"),
    # contradictions name both keys
    ("engine: {precision: fp16, zero_stage: 0}", "engine.precision: fp16 trains on engine.zero_stage 1, 2 and 3, w"),
    ("engine: {precision: bf16, zero_stage: 1}", "engine.precision: bf16 trains on engine.zero_stage 2 and 3, which"),
    ("engine: {zero_stage: 2, offload: {parameters: cpu}}", "engine.offload.parameters: needs engine.zero_stage 3, "),
    ("engine: {zero_stage: 0, offload: {optimizer: cpu}}", "engine.offload.optimizer: needs engine.zero_stage 1, 2 "),
    ("data: {seq_len: 4096}", "data.seq_len: 4096 is above model.max_seq_len 1024"),
    ("schedule: {name: plateau}\neval: {every: null}", "schedule.name: plateau cuts the rate at evaluations, but"),
        ("train: {on_spike: rewind}\ncheckpoint: {every: null}",
     "train.on_spike: rewind goes back to checkpoints, but checkpoint.every is null; give it an interval or use skip"),
    ("data: {order: {lanes: 3}}\nbatch: {global_batch_size: 4}",
     "data.order.lanes: 3 does not divide batch.global_batch_size 4"),
])
def test_one_problem_one_line(write, base, line, message):
    found = complaints(write(f"extends: base.yaml\n{line}\n"))
    assert len(found) == 1
    place, _, text = found[0].partition(": ")
    assert place.split(":")[0] == "run.yaml"
    assert text.startswith(message), found[0]


def test_missing_sections_are_named(write):
    found = complaints(write("seed: 1\n"))
    assert found == ["run.yaml: model: is missing", "run.yaml: data: is missing", "run.yaml: objective: is missing"]
    found = complaints(write("model: {width: 3}\ndata: {source: {}}\nobjective: {}\n"))
    assert [line.partition("; ")[0] for line in found] == [
        "run.yaml:1: model.family: is missing", "run.yaml: data.source.path: is missing",
        "run.yaml:3: objective.name: is missing"]


def test_all_problems_are_reported_at_once_each_with_its_own_place(write, base):
    write("extends: base.yaml\nmodel: {width: 0, q: 1}\noptim:\n  lr: 40\n", "middle.yaml")
    path = write("extends: middle.yaml\n\ncheckpoint: {every: soon}\n")
    found = complaints(path, ["data.seq_lan=3", "foo", "data.source.parts.3=1"])
    places = {line.split(": ")[0] + " " + line.split(": ")[1].split(" ")[0] for line in found}
    assert {"middle.yaml:2 model.width", "middle.yaml:2 model.q", "middle.yaml:4 optim.lr",
            "run.yaml:3 checkpoint.every", "--set data.seq_lan"} <= places
    assert '--set: "foo" is no assignment; write --set key.subkey=value' in found


def test_contradictions_are_all_reported(base):
    found = complaints(base, ["engine.zero_stage=0", "engine.offload={optimizer: cpu, parameters: cpu}",
                              "engine.precision=bf16", "data.seq_len=9999"])
    assert [line.split(": ")[1] for line in found] == [
        "engine.offload.parameters", "engine.offload.optimizer", "engine.precision", "data.seq_len"]


def test_mixtures_have_no_epochs(base):
    mixture = "data.source={kind: mixture, parts: [{weight: 1, source: {path: a}}]}"
    found = complaints(base, [mixture, "train.length=2 epochs", "eval.every=0.5 epochs"])
    assert found[0].startswith("--set: train.length: 2 epochs: data.source.kind mixture has no epochs")
    assert found[1].startswith("--set: eval.every: 0.5 epochs: ")


@pytest.mark.parametrize(("sets", "message"), [
    ("optim.lr", '--set: "optim.lr" is no assignment; write --set key.subkey=value'),
    ("=3", '--set: "=3" is no assignment'),
    ("a..b=3", '--set: "a..b=3" is no assignment'),
    ("optim.lr=[1", "--set optim.lr=[1:1: "),
    ("optim.betas.7=1", "--set: optim.betas.7: the list has 2 items, numbered from 0"),
    ("seed.x=1", "--set: seed.x: seed is 5, which has no parts"),
    ("optim.lr=40", "--set: optim.lr = 40: must be above 0"),
])
def test_bad_assignments(write, base, sets, message):
    found = complaints(write("extends: base.yaml\nseed: 5\n"), [sets])
    assert len(found) == 1
    assert found[0].startswith(message), found[0]


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n", "run.yaml: a config is sections of key: value, not a list"),
    ("extends: demoo\n", 'run.yaml:1: extends = demoo: no preset "demoo" (did you mean "demo"?)'),
    ("seed: 1\nextends: ./gone.yaml\n", "run.yaml:2: extends = ./gone.yaml: there is no file gone.yaml"),
    ("extends: {a: b}\n", "run.yaml: extends = {'a': 'b'}: must be a preset name, a path or a list of them"),
])
def test_files_that_cannot_be_laid(write, text, message):
    with pytest.raises(UserError) as caught:
        load_run_config(write(text))
    assert str(caught.value).startswith(message)


def test_unknown_presets_and_files():
    with pytest.raises(UserError, match=r'no preset "demmo" \(did you mean "demo"\?\); known: .*demo'):
        load_run_config("demmo")
    with pytest.raises(UserError, match=r"^nowhere\.yaml: no such file$"):
        load_run_config("nowhere.yaml")


def test_the_batch_of_a_world_names_a_cure(base):
    batch = load_run_config(base, ["batch={global_batch_size: 12, micro_batch_size: 4}"]).config.batch
    assert batch.resolve(3).gradient_accumulation_steps == 1
    with pytest.raises(UserError, match=r"12 is not a multiple of 5 ranks; use 10 or 15"):
        batch.resolve(5)
    with pytest.raises(UserError, match=r"4 does not divide the 6 samples of a rank .*; use one of 1, 2, 3, 6$"):
        batch.resolve(2)


def _all_fields(section, path=()):
    for key, info in fields_of(section).items():
        yield (*path, key)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _all_fields(info.annotation, (*path, key))


FIELDS = sorted(".".join(path) for path in _all_fields(RunConfig))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(field=st.sampled_from(FIELDS), position=st.integers(0, 30), letter=st.sampled_from("qzx"))
def test_a_typo_in_any_key_is_answered_with_a_real_key(field, position, letter):
    head, _, last = field.rpartition(".")
    at = position % (len(last) + 1)
    typo = last[:at] + letter + last[at:]
    with pytest.raises(UserError) as caught:
        load_run_config("demo", [f"{head}.{typo}=1".removeprefix(".")])
    line = next(str(p) for p in caught.value.problems if p.key.endswith(typo))
    if len(last) > 4:
        assert f'(did you mean "{last}"?)' in line


class Inner(Section):
    size: int = 3


class Own(Section):
    inner: Inner = Inner()
    names: list[str] = Field(default_factory=list)


def test_other_config_classes_load_by_the_same_rules(write):
    path = write("inner: {size: 4}\n", "own.yaml")
    own, origins = load_yaml_model(Own, path, ["names=[a, b]"])
    assert own == Own(inner=Inner(size=4), names=["a", "b"])
    assert origins == {"inner.size": "own.yaml", "names": "--set"}
    with pytest.raises(ConfigErrors, match=r'own\.yaml:1: inner\.sice: is no key .* \(did you mean "size"'):
        load_yaml_model(Own, write("inner: {sice: 4}\n", "own.yaml"))
