"""`pretrain generate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pretrain.cli.eval import BestOption, Dtype, DtypeOption, RemoteCodeOption, StepOption, TargetArgument
from pretrain.cli.options import JsonOption, LogLevel, LogLevelOption
from pretrain.errors import UserError


def generate(target: TargetArgument,
             prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated. Default: none, "
                                                              "which begins a document.")] = None,
             max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
             temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
             top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")] = 0,
             top_p: Annotated[float, typer.Option(min=0, max=1, help="Only the likeliest tokens that together "
                                                  "reach this probability.")] = 0.95,
             repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already there get rarer.")] = 1.0,
             count: Annotated[int, typer.Option("--count", "-n", min=1, max=256, help="Continuations a prompt.")] = 1,
             seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same texts.")] = 0,
             step: StepOption = None, best: BestOption = False, dtype: DtypeOption = Dtype.FP32,
             trust_remote_code: RemoteCodeOption = False, as_json: JsonOption = False,
             log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Continue a text."""
    from transformers.utils import logging

    from evaluation.generate import Limits
    from evaluation.generate import generate as decode
    from evaluation.sampling import Sampling
    from evaluation.target import open_target
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    logging.disable_progress_bar()
    opened = open_target(target, dtype=dtype.value, step=step, best=best, trust_remote_code=trust_remote_code)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise UserError(f"{target}: has no tokenizer.json; text cannot be read or written")
    texts = [text for text in prompt or [""] for _ in range(count)]
    start = [] if opened.eos_id is None else [opened.eos_id]
    ids = [tokenizer.encode(text).ids or start for text in texts]
    new = decode(opened.forward, ids, Limits(max_new_tokens, opened.eos_id, opened.max_seq_len), sampling,
                 vocab_size=opened.vocab_size, device=opened.device)
    for text, tokens in zip(texts, new, strict=True):
        continuation = tokenizer.decode(tokens)
        if as_json:
            typer.echo(json.dumps({"prompt": text, "text": continuation, "tokens": len(tokens)}, ensure_ascii=False))
        else:
            typer.echo(text + continuation + ("\n" if len(texts) > 1 else ""))
