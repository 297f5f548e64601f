"""Opening runs, checkpoints and folders; offline figures equal those of training."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import perplexity
from evaluation.offline import Request, default_folder, evaluate_gates, evaluate_perplexity
from evaluation.perplexity import PerplexityEvaluator
from evaluation.results import Results
from evaluation.samples import SamplesEvaluator
from evaluation.target import open_target, put_weights
from pretrain.errors import DataCorruption, UserError
from pretrain.runfolder.publish import Manifest

CPU = torch.device("cpu")


def view(config, model):
    return SimpleNamespace(config=config, step=3, rank=0, world=1, device=CPU, all_reduce=lambda t: t,
                           forward=torch.no_grad()(model.forward))


def test_a_run_and_its_checkpoint_give_the_weights(run):
    folder, model = run
    for path in (folder.root, folder.checkpoints()[0].path):
        target = open_target(str(path))
        assert not target.model.training and target.dtype == "fp32"
        for name, value in model.state_dict().items():
            assert torch.equal(target.model.state_dict()[name], value), name
    assert target.parameters() == model.config.vocab_size * 32 + sum(
        p.numel() for n, p in model.named_parameters() if "embed" not in n)


@pytest.mark.parametrize("max_batches", [None, 4])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_offline_figures_equal_those_of_training(run, run_config, max_batches, batch_size):
    folder, model = run
    config = run_config.model_copy(update={"eval": run_config.eval.model_copy(update={"max_batches": max_batches})})
    in_training = PerplexityEvaluator(None, max_batches).evaluate(view(config, model)).metrics
    target = open_target(str(folder.root))
    target.config.__dict__["eval"] = config.eval
    offline = evaluate_perplexity(target, Request(batch_size=batch_size), ["test"]).metrics
    assert offline.keys() == in_training.keys() and len(offline) == 4
    for name, metric in in_training.items():
        assert offline[name].value == pytest.approx(metric.value, rel=1e-6), name
        assert offline[name].n == metric.n


def test_results_say_what_was_measured_and_are_read_back(run):
    folder, _ = run
    target = open_target(str(folder.root))
    request = Request(baselines=True, texts=2, max_new_tokens=5, max_windows=6)
    results = evaluate_perplexity(target, request, ["pretrain", "eval", "a b"])
    path = results.write(default_folder(target, request, results))
    assert path.parent.parent == folder.eval_dir and "6-windows" in path.parent.name
    assert Results.read(path) == results
    stated = json.loads(path.read_text())
    assert stated["command"] == "pretrain eval 'a b'" and stated["dataset"]["windows"] == 6 and stated["step"] == 3
    assert stated["train_tokens"] == 4 * 8 * 64 and len(stated["weights_sha256"]) == 64
    assert len(results.samples) == 2 and all(s.prompt for s in results.samples)
    assert {b.train_tokens for b in results.baselines if b.scope == "equal tokens"} == {4 * 8 * 64}
    path.write_text(path.read_text().replace('"task_version"', '"tusk_version"'))
    with pytest.raises(DataCorruption, match="task_version"):
        Results.read(path)


def test_gates_of_a_run_pass_and_a_leak_fails(run):
    folder, _ = run
    target = open_target(str(folder.root))
    results = evaluate_gates(target, Request(), ["test"])
    assert results.passed and {"causality", "documents", "decode"} <= results.details.keys()
    target.model.config.document_masking = False
    leaking = evaluate_gates(target, Request(), ["test"])
    assert leaking.passed is False and not leaking.details["documents"]["passed"]


def test_texts_in_training_do_not_depend_on_the_rank_and_are_found_by_the_report(run, run_config, tmp_path):
    folder, model = run
    calls = []

    def forward(**inputs):
        calls.append(inputs["input_ids"].shape)
        with torch.no_grad():
            return model(**inputs)
    for rank in (0, 1):
        seen = view(run_config, model)
        seen.rank, seen.forward = rank, forward
        assert SamplesEvaluator(None, 3, folder.eval_dir).evaluate(seen).metrics == {}
    assert len(calls) == 2 * 96, "the same number of forwards on every rank, whatever is drawn"
    written = Results.read(folder.eval_dir / "step-3-samples" / "results.json")
    assert len(written.samples) == 3


def test_a_changed_byte_is_refused_before_anything_is_unpickled(run, monkeypatch):
    folder, _ = run
    file = folder.checkpoints()[0].path / "deepspeed" / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(DataCorruption, match="mp_rank_00_model_states"):
        open_target(str(folder.root))


def test_weights_that_do_not_fit_are_named(run):
    _, model = run
    state = dict(model.state_dict())
    name = next(n for n in state if "down_proj" in n)
    for broken, match in [({**state, "extra": torch.zeros(1)}, "extra"),
                          ({**state, name: torch.zeros(2, 2)}, r"down_proj.*\[2, 2\]"),
                          ({k: v for k, v in state.items() if k != name}, "holds no .*down_proj")]:
        with pytest.raises(DataCorruption, match=match):
            put_weights(model, broken, "here")
    tied = {k: v for k, v in state.items() if "lm_head" not in k}
    put_weights(model, tied, "here")


def test_a_folder_of_transformers_needs_no_unpickling_and_names_its_dtype(run, tmp_path):
    from pretrain.models.baseline.model import native_model
    _, model = run
    native_model(model).save_pretrained(tmp_path / "hf")
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        target = open_target(str(tmp_path / "hf"), dtype=dtype)
        assert target.kind == "huggingface" and {p.dtype for p in target.model.parameters()} == {torch_dtype}
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights"):
        open_target(str(tmp_path / "hf"))
    weights.pop(next(n for n in weights if "down_proj" in n))
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataCorruption, match="down_proj"):
        open_target(str(tmp_path / "hf"))


def test_masking_by_wrapper_and_by_cutting_agree(run, dataset, tmp_path):
    """The run masks attention; its plain twin cuts windows into documents. The figures are the same."""
    from pretrain.models.baseline.model import native_model
    folder, model = run
    native_model(model).save_pretrained(tmp_path / "hf")
    ours = evaluate_perplexity(open_target(str(folder.root)), Request(), ["test"]).metrics
    plain = evaluate_perplexity(open_target(str(tmp_path / "hf")), Request(data=dataset, seq_len=64, batch_size=2),
                                ["test"]).metrics
    for name, metric in ours.items():
        assert plain[name].value == pytest.approx(metric.value, rel=1e-6), name


def test_another_tokenizer_is_refused(run, dataset, tmp_path):
    folder, _ = run
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = __import__("hashlib").sha256((text + "\n").encode()).hexdigest()
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_perplexity(open_target(str(folder.root)), Request(data=other), ["test"])


@pytest.mark.parametrize(("change", "match"), [
    ({"dtype": "fp64"}, "fp64"), ({"step": 9}, "no checkpoint of step 9; there are steps 3"),
    ({"best": True}, "no checkpoint is marked best on val/loss"), ({"step": 3, "best": True}, "not both")])
def test_requests_that_fit_nothing_are_named(run, change, match):
    with pytest.raises(UserError, match=match):
        open_target(str(run[0].root), **change)


def test_other_folders_are_named(tmp_path, run):
    with pytest.raises(UserError, match="no such folder"):
        open_target(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        open_target(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is no run"):
        open_target(str(run[0].checkpoints()[0].path), step=3)


def test_the_best_checkpoint_is_the_one_pointed_at(run, run_config):
    folder, _ = run
    ref = folder.checkpoints()[0]
    later = folder.final_checkpoint(7, 1)
    shutil.copytree(ref.path, later.path)
    (later.path / "manifest.json").unlink()
    Manifest.collect(later.path, {}, step=7, k=8, fence=1, world=1, stage=0, dtype="fp32").write(later.path)
    folder.write_pointer("best-val/loss", ref)
    assert open_target(str(folder.root)).checkpoint.step == 7
    assert open_target(str(folder.root), best=True).checkpoint.step == 3
    assert open_target(str(folder.root), step=3).checkpoint.step == 3
    assert perplexity.max_samples(2, 8) == 16 and perplexity.max_samples(None, 8) is None


def test_controls_of_the_step_reach_the_forward(run_with_controls, monkeypatch):
    folder, _ = run_with_controls
    target = open_target(str(folder.root))
    seen = []
    original = type(target.model).forward

    def forward(self, *args, controls=None, **inputs):
        seen.append(controls)
        return original(self, *args, **inputs)
    monkeypatch.setattr(type(target.model), "forward", forward)
    evaluate_perplexity(target, Request(max_windows=2, texts=1, max_new_tokens=2), ["test"])
    assert len(seen) >= 3 and all(c == {"ramp": 0.5} for c in seen)
