"""The vocabulary head is applied at the rows that are asked for, and nowhere else: in training, and in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.needle_reader import Reader
from pretrain.config.needle import NeedleConfig
from pretrain.config.objective import NeedleObjectiveConfig
from pretrain.data.batch import Batch
from pretrain.data.needle import NeedleSource
from pretrain.models.afrb.backbone import OutputTable
from pretrain.objectives.needle import Needle, draw_negatives
from tests.models.afrb_small import MATRIX, VECTOR, build

SIZES = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128,
         "tie_word_embeddings": False}
TASK = NeedleConfig(vocab_size=300, ctx_chunk_len=20, needle_len=4, needle_marker="key", pool_margin=8)
B, L = 3, 4
MODELS = {"no memory": ({}, 1), "attention": ({"enable_pvm": True}, 1), "vector": (VECTOR, 1),
          "matrix": ({**MATRIX, "pvm_dk": 8}, 2)}
"""Options, and vectors a row that the head maps: a matrix memory's is scored beside the hidden state."""


def counted(options, backbone):
    """(model, rows that its head has mapped to logits, call by call)."""
    sizes = SIZES if backbone == "llama" else {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2,
                                               "n_positions": 128}
    model = build({**options, "backbone": {"hf_config": {"model_type": backbone, **sizes}}})
    seen: list[int] = []
    table = model.get_output_embeddings()
    assert isinstance(table, OutputTable)
    table.register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape[:-1].numel())
                                if inputs[0].is_floating_point() else None)
    return model, seen


def batch():
    source = NeedleSource(TASK)
    ids = np.arange(B)
    return Batch(torch.from_numpy(ids), source.get(ids).tensors)


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("name", MODELS)
def test_training_maps_answer_rows_only(name, backbone):
    options, vectors = MODELS[name]
    model, seen = counted(options, backbone)
    length = batch()["input_ids"].shape[1]
    model(batch()["input_ids"], labels=batch()["labels"])
    assert sum(seen) == B * length * vectors, "without rows the head is applied everywhere: the hook counts"
    reads = name != "no memory"
    for weights, calls in (({}, 1), ({"infonce_weight": 0.3}, 1), ({"legacy_loss": True, "lambda_retrieval": 0.5}, 2)):
        if "infonce_weight" in weights and not reads:
            continue
        seen.clear()
        objective = Needle(NeedleObjectiveConfig.model_validate(weights))
        result = objective(model, batch(), {})
        sum(result.sums.values()).backward()
        assert sum(seen) == B * L * vectors * calls, (weights, seen)
        assert result.metrics["lm_loss"][1] == B * L


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_maps_the_rows_it_answers_from(name):
    options, vectors = MODELS[name]
    model, seen = counted(options, "llama")
    sample = batch()
    reader = Reader(model, torch.device("cpu"), readout=True)
    prefix = sample["input_ids"][:, :TASK.retrieval_start]
    reader.free(prefix, L, 300)
    assert seen == [B * 1] * L * vectors, "one row a step, that of the whole prompt's last token first"
    seen.clear()
    reader.at(sample["input_ids"], sample["readout_positions"])
    assert sum(seen) == B * L * vectors


def test_negatives_are_looked_up_and_not_scored_against_the_whole_table():
    model, seen = counted(VECTOR, "llama")
    sample = batch()
    out = model(sample["input_ids"], labels=sample["labels"], readout_positions=sample["readout_positions"],
                negatives=draw_negatives(sample, 32, 1))
    assert out.terms["nce"][1] == B * L
    assert sum(seen) == B * L
