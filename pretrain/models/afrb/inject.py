"""Adapters for a model that is there already: the Python surface of the specification (section 16)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.models.afrb.calibration import set_scale_without_data, whiten_tables
from pretrain.models.afrb.family import build
from pretrain.models.afrb.model import AFRBForCausalLM
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.afrb.state import AFRBState
from pretrain.models.base import BuildContext


def inject_afrb_adapters(model: PreTrainedModel, n_afrb: int = 1, alpha: float = 0.04, omega: float = 6.0,
                         gamma: float = 0.2, device: torch.device | str | None = None, use_pvm: bool = False,
                         pvm_alpha: float = 0.3, pvm_beta: float | None = None, *, train_backbone: bool = False,
                         seed: int = 0, **options: Any) -> AFRBForCausalLM:
    """A causal language model of transformers with adapters after its embedding.

    The wrapped model's weights are the given model's own (shared; frozen, unless `train_backbone`), except those of
    attention where `disable_attn=True`; the adapters are fresh, in fp32, and start as the identity.

    Args:
        model: Llama, Mistral, GPT-2 or GPT-Neo.
        n_afrb, alpha, omega, gamma, use_pvm, pvm_alpha, pvm_beta: as in `AFRBConfig` (`enable_pvm`).
        device: where the result goes; None: where the model is.
        train_backbone: also train the given model's weights.
        seed: of the adapters' weights, and of the random ids on which the scale of a matrix memory is measured.
        options: any other field of `AFRBConfig`.

    Raises:
        ValueError: the model is of another kind, or options contradict each other.
    """
    retention = {} if pvm_beta is None else {"pvm_beta": pvm_beta}
    cfg = AFRBConfig.model_validate({
        "backbone": {"hf_config": model.config.to_diff_dict() | _sizes(model), "trained": train_backbone},
        "n_afrb": n_afrb, "alpha": alpha, "omega": omega, "gamma": gamma, "enable_pvm": use_pvm,
        "pvm_alpha": pvm_alpha, **retention, **options})
    wrapped = build(cfg, BuildContext(seed=seed))
    assert isinstance(wrapped, AFRBForCausalLM)
    native = wrapped.backbone.native
    wanted = native.state_dict()
    given = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in wanted}
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise ValueError(f"{type(model).__name__} holds no {missing[0]}: it is of another layout than "
                         f"{', '.join(type(cfg.backbone).architectures)}")
    native.load_state_dict(given, assign=True)
    native.tie_weights()
    native.requires_grad_(train_backbone)
    wrapped = wrapped.to(device or model.device)
    whiten_tables(wrapped)
    if wrapped.memory is not None and cfg.pvm_scale is None:
        was_training = wrapped.training
        set_scale_without_data(wrapped.eval(), seed)
        wrapped.train(was_training)
    return wrapped


def get_pvm_readout(model: AFRBForCausalLM, tokens: Tensor, state: AFRBState | None = None
                    ) -> tuple[Tensor, AFRBState]:
    """(what the memory says after the last of the tokens [B, T], state to go on from); nothing is kept on the model.

    Raises ValueError where nothing is read out.
    """
    return model.get_pvm_readout(tokens, state)


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes that are at their defaults too, which a diff leaves out."""
    config = model.config
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size", "n_inner", "max_position_embeddings", "tie_word_embeddings",
             "rms_norm_eps", "layer_norm_epsilon", "rope_parameters", "attention_types", "window_size",
             "activation_function", "hidden_act")
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
