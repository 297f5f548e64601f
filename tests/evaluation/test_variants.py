"""Models made of a config or a checkpoint: what comes from the weights a run started from, what from its backbone."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.needle_eval import evaluate_needle
from evaluation.needle_gate import gate_figures
from evaluation.needle_tables import needle_section, needle_tables
from evaluation.needle_variants import rebuilt, variants
from evaluation.offline import Request, evaluate_perplexity
from evaluation.target import open_target
from evaluation.untrained import untrained
from pretrain.config.needle import NeedleConfig
from pretrain.config.objective import NeedleObjectiveConfig
from pretrain.config.run import RunConfig
from pretrain.config.source import DataConfig, ShardsConfig
from pretrain.data.needle import NeedleSource
from pretrain.data.open import eval_batches, open_source
from pretrain.errors import UserError

CPU = torch.device("cpu")
LLAMA = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128,
         "tie_word_embeddings": False}


def config(folder: Path, name: str, init_from: Path | None = None, **model) -> RunConfig:
    """An adapter without attention on the backbone that lies in `folder`."""
    return RunConfig.model_validate({
        "name": name, "runs_dir": str(folder / "runs"), "objective": {"name": "causal_lm"},
        "model": {"family": "afrb", "disable_attn": True, "layerscale_init": 0.1,
                  "backbone": {"weights": str(folder / "backbone"), "hf_config": {"model_type": "llama", **LLAMA}},
                  **model},
        "data": {"seq_len": 16, "source": {"kind": "synthetic", "vocab_size": 400}},
        "batch": {"global_batch_size": 4}, "train": {"init_from": init_from and str(init_from)}})


def test_attention_that_a_run_went_without_is_the_backbones_whatever_the_run_began_with(tmp_path, checkpointed):
    torch.manual_seed(7)
    source = LlamaForCausalLM(LlamaConfig(**LLAMA))
    source.save_pretrained(tmp_path / "backbone")
    folder, first = checkpointed(config(tmp_path, "first"), seed=3)
    names = [name for name, _ in source.named_parameters() if "self_attn" in name]
    assert len(names) == 8
    for init_from in (None, folder.root):
        target = replace(open_target(str(folder.root)), config=config(tmp_path, "second", init_from))
        found = {variant.name: model for variant, model in variants(target, 128)}
        assert found.keys() == {"backbone_without_attention", "backbone", "attention_on"}
        for model in (found["backbone"], found["attention_on"]):
            for name in names:
                assert torch.equal(model.model.get_parameter(f"backbone.native.{name}"), source.get_parameter(name))
        changed = rebuilt(target, {"disable_attn": False}).model
        for name, value in first.named_parameters():
            assert torch.equal(changed.get_parameter(name), value), "everything else is the run's"


def test_a_reference_that_does_not_take_the_context_is_left_out_and_said(tmp_path, checkpointed):
    """Without attention any context will do; the backbone with its attention takes 128 tokens."""
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "backbone")
    folder, _ = checkpointed(config(tmp_path, "free"), seed=3)
    task = ("data.source.ctx_chunk_len=32", "data.source.needle_len=4", "data.source.needle_marker=key")
    request = Request(batch_size=4, max_windows=4, controls=True, sets=task)
    results = evaluate_needle(open_target(str(folder.root)), request, ["test"])
    assert [row["name"] for row in results.details["references"]] == ["backbone_without_attention"]
    assert results.details["left_out"] == dict.fromkeys(
        ("backbone", "attention_on"), "not asked: takes 128 tokens, 138 are needed")
    console = Console(file=io.StringIO(), width=160)
    console.print(*needle_tables(results))
    for text in (console.file.getvalue(), needle_section([results])):
        assert "attention_on: not asked: takes 128 tokens, 138 are needed" in text
    bound, _ = checkpointed(config(tmp_path, "bound", disable_attn=False), seed=3)
    with pytest.raises(UserError, match=r"138 tokens are more than the 128 that the model of .*bound takes"):
        evaluate_needle(open_target(str(folder.root)), replace(request, null=str(bound.root)), ["test"])


def test_what_a_write_gate_lets_in_is_told(tmp_path, checkpointed):
    """A gate that is half open everywhere, and one that is open to the needle's own ids alone."""
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "backbone")
    gated = config(tmp_path, "gated", enable_pvm=True, pvm_memory="matrix", pvm_dk=8, pvm_dv=8, pvm_scale=3.0,
                   pvm_write_gate=True, pvm_gate_taps=1)
    folder, _ = checkpointed(gated, seed=3)
    target = open_target(str(folder.root))
    gate = target.model.memory.gate
    gate.weight.data.zero_()
    gate.bias.start.fill_(0.0)
    task = ("data.source.ctx_chunk_len=16", "data.source.needle_len=4", "data.source.needle_marker=key")
    results = evaluate_needle(target, Request(batch_size=4, max_windows=6, controls=True, sets=task), ["test"])
    found = results.details["write_gate"]
    assert (found["needle"], found["needle_least"], found["elsewhere"]) == (0.5, 0.5, 0.5)
    assert (found["tokens"], found["elsewhere_sum"], found["elsewhere_open"]) == (6 * (64 - 8), 28.0, 0.0)
    source = NeedleSource(NeedleConfig.model_validate(results.details["task"]))
    needle = torch.from_numpy(source.rows(np.arange(1)).needle)

    class Only(torch.nn.Module):
        """Open to four ids."""

        def forward(self, input_ids, **_):
            return SimpleNamespace(diagnostics={"write_gate": torch.isin(input_ids, needle).float()})
    only = gate_figures(replace(target, module=Only(), model=Only()), source, np.arange(1), 4)
    assert (only["needle"], only["elsewhere"], only["elsewhere_open"]) == (1.0, 0.0, 0.0)
    console = Console(file=io.StringIO(), width=160)
    console.print(*needle_tables(results))
    assert "write gate: 0.500 of the needle (least 0.500), 50.00% of the rest, 28.0 tokens" in console.file.getvalue()


def test_nothing_is_measured_for_a_variant(tmp_path, checkpointed):
    """The scale of a memory comes with the weights; the task's 137 tokens are more than the backbone takes."""
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "backbone")
    whole = config(tmp_path, "needles", enable_pvm=True, pvm_memory="matrix", pvm_dk=8, pvm_dv=8, pvm_scale=3.0)
    folder, _ = checkpointed(whole, seed=3)
    target = open_target(str(folder.root))
    task = NeedleConfig(vocab_size=400, ctx_chunk_len=32, needle_len=4, needle_marker="key")
    assert task.seq_len > LLAMA["max_position_embeddings"]
    trained = whole.model_copy(update={
        "model": whole.model.model_copy(update={"pvm_scale": None}), "objective": NeedleObjectiveConfig(),
        "data": DataConfig(source=task, seq_len=task.seq_len)})
    changed = rebuilt(replace(target, config=trained), {"disable_attn": False}).model
    assert float(changed.memory.log_scale().exp().detach()) == pytest.approx(3.0)


def test_a_config_that_starts_from_a_run_stands_for_that_runs_weights(tmp_path, checkpointed):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "backbone")
    folder, first = checkpointed(config(tmp_path, "first"), seed=3)
    second = untrained(config(tmp_path, "second", folder.root), CPU)
    for name, value in first.named_parameters():
        assert torch.equal(second.get_parameter(name), value), name
    alone = untrained(config(tmp_path, "alone"), CPU)
    assert not torch.equal(alone.get_input_embeddings().weight, first.get_input_embeddings().weight)


def test_a_perplexity_stands_beside_those_of_its_backbone(tmp_path, checkpointed, dataset):
    """The untouched backbone's is that of the plain transformers model; the memory read empty or not at all too."""
    torch.manual_seed(7)
    source = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.3)).eval()
    source.save_pretrained(tmp_path / "backbone")
    hybrid = config(tmp_path, "hybrid", disable_attn=False, enable_pvm=True)
    data = DataConfig(source=ShardsConfig(path=str(dataset)), seq_len=32, document_masking=False)
    folder, _ = checkpointed(hybrid.model_copy(update={"data": data}), seed=3)
    target = open_target(str(folder.root))
    with torch.no_grad():
        for name, value in source.named_parameters():
            target.model.get_parameter(f"backbone.native.{name}").copy_(value)
    plain = evaluate_perplexity(target, Request(max_windows=8, seq_len=32), ["test"])
    assert plain.metrics.keys() == {"val/loss", "val/perplexity", "val/accuracy", "val/bits_per_byte"}
    results = evaluate_perplexity(target, Request(max_windows=8, seq_len=32, controls=True), ["test"])
    found = {name.rpartition("/")[2]: metric for name, metric in results.metrics.items() if name.count("/") == 2}
    assert found.keys() == results.details["brackets"].keys() == {
        "memory_zero", "readout_off", "backbone_without_attention", "backbone", "attention_off"}
    assert results.metrics["val/perplexity"] == plain.metrics["val/perplexity"]
    assert {metric.n for metric in found.values()} == {plain.metrics["val/perplexity"].n}
    windows = open_source(ShardsConfig(path=str(dataset), split="val"), data)
    nll, n = 0.0, 0
    for batch in eval_batches(windows, rank=0, world=1, batch_size=4, max_samples=8):
        with torch.no_grad():
            logits = source(batch["input_ids"]).logits
        nll += float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"))
        n += int((batch["labels"] != -100).sum())
    assert found["backbone"].n == n and found["backbone"].value == pytest.approx(math.exp(nll / n), rel=1e-4)
    values = {round(metric.value, 2) for metric in (plain.metrics["val/perplexity"], *found.values())}
    assert len(values) == 6, "all are of different models, also those that read nothing: blocks take in a memory too"
