"""Parameter groups of AdamW: matrices decay; biases, norms and embeddings do not."""

from __future__ import annotations

from torch import nn

from pretrain.models.base import ParamGroup


def decay_groups(model: nn.Module, weight_decay: float) -> list[ParamGroup]:
    """Trainable parameters, each in exactly one of two groups (an empty group is left out).

    A table that is tied to an output matrix is an embedding. Weights that ZeRO-3 has already partitioned are judged by
    their whole shape.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():  # yields tied parameters once
        if parameter.requires_grad:
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else others).append(parameter)
    groups = [ParamGroup("decay", decayed, weight_decay=weight_decay), ParamGroup("no_decay", others)]
    return [group for group in groups if group.params]
