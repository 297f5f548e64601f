"""Models made of a config or a checkpoint: what comes from the weights a run started from, what from its backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.needle_variants import rebuilt, variants
from evaluation.target import open_target
from evaluation.untrained import untrained
from pretrain.config.run import RunConfig

CPU = torch.device("cpu")
LLAMA = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128,
         "tie_word_embeddings": False}


def config(folder: Path, name: str, init_from: Path | None = None) -> RunConfig:
    """An adapter without attention on the backbone that lies in `folder`."""
    return RunConfig.model_validate({
        "name": name, "runs_dir": str(folder / "runs"), "objective": {"name": "causal_lm"},
        "model": {"family": "afrb", "disable_attn": True, "layerscale_init": 0.1,
                  "backbone": {"weights": str(folder / "backbone"), "hf_config": {"model_type": "llama", **LLAMA}}},
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
        found = {variant.name: model for variant, model in variants(target)}
        assert found.keys() == {"backbone_without_attention", "backbone", "attention_on"}
        for model in (found["backbone"], found["attention_on"]):
            for name in names:
                assert torch.equal(model.model.get_parameter(f"backbone.native.{name}"), source.get_parameter(name))
        changed = rebuilt(target, {"disable_attn": False}).model
        for name, value in first.named_parameters():
            assert torch.equal(changed.get_parameter(name), value), "everything else is the run's"


def test_a_config_that_starts_from_a_run_stands_for_that_runs_weights(tmp_path, checkpointed):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "backbone")
    folder, first = checkpointed(config(tmp_path, "first"), seed=3)
    second = untrained(config(tmp_path, "second", folder.root), CPU)
    for name, value in first.named_parameters():
        assert torch.equal(second.get_parameter(name), value), name
    alone = untrained(config(tmp_path, "alone"), CPU)
    assert not torch.equal(alone.get_input_embeddings().weight, first.get_input_embeddings().weight)
