"""An export stands alone, is proven before it appears, and is refused once changed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from evaluation import export as export_module
from evaluation.export import export_run
from evaluation.offline import Request, default_folder, evaluate_perplexity
from evaluation.target import open_target
from evaluation.verify_export import largest_difference
from pretrain.errors import CheckFailed, DataCorruption, ExitCode, UserError


@pytest.fixture
def in_process(monkeypatch):
    """The check of the fresh process, without its start."""
    monkeypatch.setattr(export_module, "_fresh_process", largest_difference)


def evaluated(folder):
    target = open_target(str(folder.root))
    results = evaluate_perplexity(target, Request(baselines=True), ["test"])
    results.write(default_folder(target, Request(), results))
    return results


def test_native_export_round_trip_through_a_fresh_process(run, dataset):
    folder, model = run
    results = evaluated(folder)
    done = export_run(str(folder.root))
    assert done.folder == folder.export_dir / "step-3-fp32" and done.largest_difference < 1e-5
    assert sorted(p.name for p in folder.export_dir.iterdir()) == ["step-3-fp32"], "nothing temporary is left"
    loaded = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr(), "tied weights stay tied"
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids, return_logits=True).logits, atol=1e-5, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer.decode(tokenizer("def return self").input_ids) == "def return self"
    assert loaded.generation_config.eos_token_id == 0
    card = (done.folder / "README.md").read_text()
    fingerprint = json.loads((done.folder / "provenance.json").read_text())["dataset"]["fingerprint"]
    for part in (fingerprint, f"{results.metrics['val/loss'].value:.4f}", "bigram, equal tokens", "salad",
                 "dtype=torch.float32", "seq_len: 64", "documents kept apart"):
        assert part in card, part
    exported = open_target(str(done.folder))
    assert exported.kind == "export" and exported.eos_id == 0 and exported.provenance["step"] == 3
    offline = evaluate_perplexity(exported, Request(data=dataset, seq_len=64), ["test"])
    assert offline.metrics["val/loss"].value == pytest.approx(results.metrics["val/loss"].value, rel=1e-6)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("native", [True, False])
def test_every_form_holds_the_same_weights(run, in_process, dtype, torch_dtype, native):
    folder, model = run
    done = export_run(str(folder.root), dtype=dtype, native=native)
    files = load_file(done.folder / "model.safetensors")
    prefix = "" if native else "native."
    for name, parameter in model.named_parameters():
        name = name.removeprefix("native.")
        assert torch.equal(files[prefix + name], parameter.detach().to(torch_dtype)), name
    assert json.loads((done.folder / "config.json").read_text())["model_type"] == ("llama" if native else "baseline")


def test_an_export_that_is_not_the_model_leaves_nothing(run, monkeypatch):
    """Weights damaged on their way to the disk: the fresh process sees other logits."""
    folder, _ = run
    write = export_module._write_model

    def damage(model, target, out):
        write(model, target, out)
        weights = load_file(out / "model.safetensors")
        next(v for n, v in weights.items() if "down_proj" in n).mul_(1.5)
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(export_module, "_write_model", damage)
    with pytest.raises(CheckFailed, match="logits that differ") as caught:
        export_run(str(folder.root))
    assert caught.value.code is ExitCode.FAILED_CHECK == 5
    assert list(folder.export_dir.iterdir()) == []


def test_an_export_that_cannot_be_loaded_leaves_nothing(run, monkeypatch):
    folder, _ = run
    write = export_module._write_model

    def damage(model, target, out):
        write(model, target, out)
        (out / "model.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(export_module, "_write_model", damage)
    with pytest.raises(CheckFailed, match="cannot be loaded"):
        export_run(str(folder.root))
    assert list(folder.export_dir.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_a_tampered_export_is_refused(run, in_process, name):
    done = export_run(str(run[0].root))
    file = done.folder / name
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataCorruption, match=name):
        open_target(str(done.folder))
    file.unlink()
    with pytest.raises(DataCorruption, match=f"{name}: is missing"):
        open_target(str(done.folder))


def test_a_folder_that_is_there_is_replaced_only_when_asked(run, in_process):
    folder, _ = run
    out = folder.root / "mine"
    export_run(str(folder.root), out=out)
    (out / "mark").touch()
    with pytest.raises(UserError, match="--overwrite"):
        export_run(str(folder.root), out=out)
    assert (out / "mark").exists()
    export_run(str(folder.root), out=out, overwrite=True)
    assert not (out / "mark").exists() and open_target(str(out)).kind == "export"
    with pytest.raises(UserError, match="no run or checkpoint"):
        export_run(str(out))
    with pytest.raises(UserError, match="fp32 or bf16"):
        export_run(str(folder.root), dtype="fp16")


def test_large_weights_are_cut_into_shards(run, in_process, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_SIZE", "30KB")
    done = export_run(str(run[0].root))
    shards = sorted(done.folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 80_000 for s in shards)
    assert open_target(str(done.folder)).parameters() == open_target(str(run[0].root)).parameters()
