"""Gates of every model, language model or encoder: padding and company in the batch change nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.gates.base import OTHER_SHAPES, SAME_SHAPES, GateResult, Probe, at_most, relative_difference


def outputs(probe: Probe, input_ids: Tensor, real: int | None = None, **inputs: Tensor) -> Tensor:
    """Everything a model says about each row, side by side: [B, *]. Of a language model the first `real` positions."""
    if probe.language_model:
        return probe.logits(input_ids, **inputs)[:, :real].flatten(1)
    heads = probe.model(input_ids=input_ids, **inputs).heads
    return torch.cat([heads[name].flatten(1) for name in sorted(heads)], 1)


def padding(probe: Probe) -> GateResult:
    """Padding on the right, whatever its tokens are, changes nothing for the real ones."""
    name, length = "padding", probe.seq_len
    real = max(1, 3 * length // 4)
    tokens = probe.tokens(3, length)
    mask = (torch.arange(length, device=probe.device) < real).long().expand(tokens.shape)
    inputs = {"attention_mask": mask} if probe.takes("attention_mask") else {"document_ids": 1 - mask}
    other = torch.where(mask.bool(), tokens, probe.other_tokens(tokens))
    padded, again = (outputs(probe, t, real, **inputs) for t in (tokens, other))
    seen = relative_difference(again, padded)
    if not seen <= SAME_SHAPES:
        return at_most(name, seen, SAME_SHAPES, "outputs when the tokens under the padding change")
    bare = outputs(probe, tokens[:, :real])
    return at_most(name, relative_difference(padded, bare), OTHER_SHAPES, "outputs with padding against without")


def batch_composition(probe: Probe) -> GateResult:
    """A row gives the same alone as beside others, and does not depend on what the others are."""
    name = "batch"
    tokens = probe.tokens(3, probe.seq_len)
    other = tokens.clone()
    other[1:] = probe.other_tokens(tokens[1:])
    beside, again = outputs(probe, tokens)[:1], outputs(probe, other)[:1]
    seen = relative_difference(again, beside)
    if not seen <= SAME_SHAPES:
        return at_most(name, seen, SAME_SHAPES, "outputs of a row when the other rows change")
    alone = outputs(probe, tokens[:1])
    return at_most(name, relative_difference(beside, alone), OTHER_SHAPES, "outputs of a row in a batch against alone")


def text_documents(probe: Probe) -> GateResult | None:
    """Token states of a text are those of the text alone. None for encoders that take one text a row."""
    length = probe.seq_len
    tokens = probe.tokens(2, length)
    if not probe.takes("document_ids"):
        return None
    index = torch.arange(length, device=probe.device)
    ids = (index >= length // 3).long().expand(tokens.shape)
    inside = ids[0] == 1
    states = _token_states(probe, tokens, document_ids=ids)
    alone = _token_states(probe, tokens[:, inside])
    return at_most("documents", relative_difference(states[:, inside], alone), OTHER_SHAPES,
                   "token states of a text inside a window against the text alone")


def _token_states(probe: Probe, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    out = probe.model(input_ids=input_ids, **inputs)
    if not out.aux or "token_states" not in out.aux:
        raise TypeError(f"{type(probe.model).__name__} takes document_ids but returns no aux['token_states']")
    return out.aux["token_states"]
