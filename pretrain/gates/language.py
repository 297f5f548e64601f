"""Gates of causal language models: what a position may see, and that decoding agrees with the forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.gates.base import OTHER_SHAPES, SAME_SHAPES, GateResult, Probe, at_most, relative_difference

_SIGMAS = 5.0
"""Standard errors that the loss on random tokens may lie below ln V: one false alarm in three million."""
_RANDOM_TOKENS = 2048
_DECODED = 24
"""Tokens that the decode gate runs step by step."""


def causality(probe: Probe) -> GateResult:
    """Tokens after t do not change the logits at or before t, with one document a row and with several."""
    name, rows, length = "causality", 4, probe.seq_len
    tokens = probe.tokens(rows, length)
    last = torch.linspace(0, length - 2, rows).long().to(probe.device)
    index = torch.arange(length, device=probe.device)
    future = index > last[:, None]
    changed = torch.where(future, probe.other_tokens(tokens), tokens)
    variants: list[dict[str, Tensor]] = [{}]
    if probe.takes("document_ids"):
        variants.append({"document_ids": (index >= length // 3).long().expand(rows, length)})
    value = 0.0
    for inputs in variants:
        before, after = probe.logits(tokens, **inputs), probe.logits(changed, **inputs)
        if relative_difference(after[future], before[future]) <= SAME_SHAPES:
            return GateResult(name, False, 0.0, SAME_SHAPES, "logits do not depend on the input: nothing can be tested")
        value = max(value, relative_difference(after[~future], before[~future]), key=_nan_last)
    return at_most(name, value, SAME_SHAPES, "logits up to t when tokens after t change")


def documents(probe: Probe) -> GateResult:
    """A document's logits are those of the document alone, whatever stands before and after it in the window."""
    name = "documents"
    if not probe.takes("document_ids"):
        return GateResult(name, False, math.inf, 0.0, "forward takes no document_ids: documents of a window cannot be "
                          "told apart")
    tokens, ids, inside = _three_documents(probe)
    others = torch.where(inside, tokens, probe.other_tokens(tokens))
    first, second = (probe.logits(t, document_ids=ids)[:, inside] for t in (tokens, others))
    alone = probe.logits(tokens[:, inside])
    seen, differs = relative_difference(second, first), relative_difference(first, alone)
    if not seen <= SAME_SHAPES:
        return at_most(name, seen, SAME_SHAPES, "logits of a document when its neighbours in the window change")
    return at_most(name, differs, OTHER_SHAPES, "logits of a document inside a window against the document alone")


def decode(probe: Probe) -> GateResult:
    """Step by step with the cache gives the logits of one forward pass."""
    name = "decode"
    length = min(probe.seq_len, 2 * _DECODED)
    start = max(1, length - _DECODED)
    tokens = probe.tokens(2, length)
    expected = probe.logits(tokens)
    out = probe.model(input_ids=tokens[:, :start], use_cache=True, return_logits=True)
    steps = [out.logits]
    for t in range(start, length):
        if out.past_key_values is None:
            return GateResult(name, False, math.inf, OTHER_SHAPES, "forward returned no past_key_values for "
                              "use_cache=True")
        out = probe.model(input_ids=tokens[:, t:t + 1], past_key_values=out.past_key_values, use_cache=True,
                          return_logits=True)
        steps.append(out.logits)
    value = relative_difference(torch.cat(steps, 1), expected)
    return at_most(name, value, OTHER_SHAPES, "logits decoded step by step against one forward pass")


def random_tokens(probe: Probe) -> GateResult:
    """The loss knows no labels: it is that of logits computed without them, and not below ln V on random tokens.

    On uniform random tokens the expected loss of any prediction that does not know the label is ln V plus a divergence
    >= 0, trained or not. The limit lies five standard errors below, from the spread around ln V that the logits have on
    these tokens; the value is the loss that the model reports when it is given the labels.
    """
    name, length = "random_tokens", probe.seq_len
    floor = math.log(probe.vocab_size)
    rows = max(1, _RANDOM_TOKENS // length)
    reported, blind, squares = 0.0, 0.0, 0.0
    for _ in range(rows):
        window = probe.tokens(1, length + 1)
        inputs, labels = window[:, :-1], window[:, 1:]
        nll = torch.nn.functional.cross_entropy(probe.logits(inputs)[0], labels[0], reduction="none").double()
        blind += float(nll.sum())
        squares += float((nll - floor).square().sum())
        reported += float(probe.model(input_ids=inputs, labels=labels).nll_sum)
    count = rows * length
    mean, limit = reported / count, floor - _SIGMAS * math.sqrt(squares) / count
    if not abs(reported - blind) / count <= OTHER_SHAPES * floor:
        return GateResult(name, False, mean, blind / count, f"reported loss {mean:.4f}, but logits computed without "
                          f"labels have {blind / count:.4f}: the loss knows its labels, or is no log-likelihood")
    passed = mean >= limit
    return GateResult(name, passed, mean, limit, f"loss on uniform random tokens {mean:.4f}, "
                      f"{'not below' if passed else 'below'} ln V = {floor:.4f} less the sampling error")


def _three_documents(probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [2, T], document ids [2, T], and the places [T] of the document in the middle."""
    length = probe.seq_len
    index = torch.arange(length, device=probe.device)
    ids = (index >= length // 4).long() + (index >= 3 * length // 4).long()
    return probe.tokens(2, length), ids.expand(2, length), ids == 1


def _nan_last(value: float) -> float:
    """Order in which a value that is not a number is the largest."""
    return math.inf if math.isnan(value) else value
