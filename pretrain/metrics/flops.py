"""Floating-point operations of a forward pass, counted operator by operator."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def counted_flops(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of `model(**batch)`; a multiply-add is 2, only matrix products and convolutions count.

    The count is made on a twin without storage (the meta device) with attention written out as two products over all
    T x T pairs: torch counts its fused CPU kernel as zero. Neither the model nor the batch is computed with, so this is
    cheap at any size.
    """
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        twin = type(model)._from_config(config, attn_implementation="eager").eval()
        inputs = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(**inputs)
    return counter.get_total_flops()
