"""Small AFRB models on every kind of backbone, for the tests."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch
from pretrain.models.afrb.backbone import table_rows
from pretrain.models.afrb.family import FAMILY
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.base import BuildContext

V, T = 97, 40
BACKBONES = {
    "llama": {"model_type": "llama", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
              "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.1},
    "gpt2": {"model_type": "gpt2", "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "initializer_range": 0.1},
    "gpt_neo": {"model_type": "gpt_neo", "vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "window_size": 8,
                "initializer_range": 0.1},
}
BACKBONES["mistral"] = {**BACKBONES["llama"], "model_type": "mistral", "sliding_window": None}
VECTOR = {"enable_pvm": True, "disable_attn": True}
MATRIX = {"enable_pvm": True, "pvm_memory": "matrix", "pvm_dk": 16, "pvm_dv": 8, "disable_attn": True}
MODES = {
    "adapter with attention": {},
    "conv mixer, two blocks": {"mixer": "conv", "n_afrb": 2, "phase_delta": 0.3, "disable_attn": True},
    "attention replaced by the identity": {"disable_attn": True, "disable_attn_mode": "identity"},
    "embed, four cascaded blocks": {"phase_mode": "embed", "n_afrb": 4, "cascade_lambda": 0.1, "cascade_kappa": 0.1,
                                    "omega_delta": 0.5, "adaptive_omega": True, "omega_max": 8.0, **VECTOR},
    "trace": {**VECTOR},
    "trace with attention, top states": {"enable_pvm": True, "readout_topk": 4, "n_afrb": 2},
    "trace with a window of attention": {"enable_pvm": True, "attention_window": 5},
    "state": {"readout_mode": "state", **VECTOR},
    "state, original order": {"readout_mode": "state", "pvm_order": "accumulate_then_rotate", "t2_enable": True,
                              **VECTOR},
    "window": {"readout_mode": "window:5", "needle_query_mode": "phase_weighted", **VECTOR},
    "learned query, write gate, ladder": {"needle_query_mode": "learned", "pvm_write_gate": True,
                                          "pvm_omega_mode": "ladder", "t2_enable": True, "t2_mode": "resonant",
                                          **VECTOR},
    "token clock": {"pvm_phase_clock": "token", "pvm_omega_mode": "uniform", **VECTOR},
    "memory not read": {"readout_from": "none", **VECTOR},
    "matrix": {"n_afrb": 0, **MATRIX},
    "matrix with attention": {**MATRIX, "disable_attn": False, "pvm_omega_mode": "rope"},
    "matrix, delta, content, gate": {"pvm_rule": "delta", "pvm_phase_clock": "content", "pvm_content_frequencies": 8,
                                     "pvm_write_gate": True, "pvm_gate_marks": 6, **MATRIX},
    "matrix, gate": {"pvm_write_gate": True, **MATRIX},
    "matrix, gated decay": {"pvm_rule": "gated", "pvm_fade_init": 0.0, "pvm_phase_clock": "learned",
                            "pvm_write_gate": True, **MATRIX},
    "matrix, log clock, decay": {"pvm_phase_clock": "log", "pvm_omega_mode": "scalar", "pvm_beta": 0.9, **MATRIX},
    "matrix, learned taps, query": {"pvm_phase_clock": "learned", "pvm_separate_query": True, "pvm_row_norm": False,
                                    **MATRIX},
    "matrix, no clock": {"pvm_phase_clock": "none", "pvm_init": "random", **MATRIX},
    "matrix, stepped head": {"pvm_read": "step", "pvm_address_taps": 6, "pvm_query_taps": 3, **MATRIX},
}


def config(mode="adapter with attention", backbone="llama", **changes):
    """A schema; `mode` is a name of MODES or a dict of options."""
    options = MODES[mode] if isinstance(mode, str) else mode
    return AFRBConfig.model_validate({"backbone": {"hf_config": BACKBONES[backbone]}, **options, **changes})


def build(mode="adapter with attention", backbone="llama", ctx=None, **changes):
    """A model in eval mode."""
    return FAMILY.build(config(mode, backbone, **changes), ctx or BuildContext(seed=1)).eval()


def run_config(mode="trace", init_from=None, **changes):
    """A run of this model."""
    return RunConfig.model_validate({
        "model": config(mode, **changes).model_dump(by_alias=True), "train": {"init_from": init_from},
        "objective": {"name": "causal_lm"},
        "data": {"seq_len": T, "source": {"kind": "synthetic", "vocab_size": V}}})


def hooks(mode="trace", **changes):
    """Hooks of such a run."""
    return FAMILY.hooks(run_config(mode, **changes))


def open_up(model, seed=0):
    """Give every parameter that starts at zero a small value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def whole_table(table):
    """[V, D] of an embedding or an output table."""
    return torch.cat([*table_rows(table, V, torch.device("cpu"))])


def tokens(rows=2, length=T, seed=0):
    """Random ids."""
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


class Alone:
    """An `EngineStartContext` of one process over needle-like samples."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, model=None, rows=4, missing=frozenset()):
        self.model, self.rows, self.missing = model, rows, missing

    def train_samples(self, n):
        ids = tokens(n, T + 1, seed=11)
        positions = torch.arange(T - self.rows, T).expand(n, -1)
        tensors = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        return Batch(torch.arange(n), {**tensors, **({"readout_positions": positions} if self.rows else {})})

    def all_reduce(self, tensor):
        return tensor

    def full_parameter(self, name, write=None):
        parameter = self.model.get_parameter(name)
        if write is not None:
            with torch.no_grad():
                parameter.copy_(write)
        return parameter.detach().clone()

    def gathered_in_use(self):
        return nullcontext()
