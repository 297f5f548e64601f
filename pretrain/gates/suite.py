"""All gates on one model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from pretrain.gates.base import GateResult, Probe, probing
from pretrain.gates.invariance import batch_composition, padding, text_documents
from pretrain.gates.language import causality, decode, documents, random_tokens
from pretrain.models.base import EncoderOutput, LMOutput

Gate = Callable[[Probe], GateResult | None]
LANGUAGE_MODEL: tuple[Gate, ...] = (causality, padding, documents, decode, batch_composition, random_tokens)
ENCODER: tuple[Gate, ...] = (padding, text_documents, batch_composition)
_SHORTEST = 16


def run_gates(model: PreTrainedModel, *, vocab_size: int, seq_len: int, seed: int,
              device: torch.device) -> list[GateResult]:
    """Probe a model that returns `LMOutput` or `EncoderOutput` and lies whole on `device`.

    Args:
        model: its weights, mode and random state are as before afterwards.
        vocab_size: ids are drawn from [0, vocab_size), two at least.
        seq_len: tokens a window, 16 at least.
        seed: of the drawn tokens.
        device: where the inputs go.
    """
    if vocab_size < 2 or seq_len < _SHORTEST:
        raise ValueError(f"gates need a vocabulary of 2 and {_SHORTEST} tokens at least, got {vocab_size}, {seq_len}")
    with probing(model, seed) as probed:
        language_model = _is_language_model(probed, device)
        probe = Probe(probed, vocab_size, seq_len, device, torch.Generator().manual_seed(seed), language_model)
        gates = LANGUAGE_MODEL if language_model else ENCODER
        results = [gate(probe) for gate in gates]
    return [result for result in results if result is not None]


def _is_language_model(model: PreTrainedModel, device: torch.device) -> bool:
    """By the output of a forward pass. Raises TypeError for anything the contract does not know."""
    out = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    if not isinstance(out, (LMOutput, EncoderOutput)):
        raise TypeError(f"forward of {type(model).__name__} returned {type(out).__name__}, neither LMOutput nor "
                        "EncoderOutput")
    return isinstance(out, LMOutput)
