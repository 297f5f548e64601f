"""Evaluations of a finished or running model, outside of training: one process, one results.json each."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation import perplexity
from evaluation.baselines import ngram_baselines
from evaluation.brackets import bracketed
from evaluation.generate import Limits, generate
from evaluation.perplexity import ValidationData, read_token_bytes
from evaluation.results import MetricRecord, NGramRecord, Results, TextSample, records
from evaluation.samples import PROMPT_TOKENS, SAMPLING, prompts
from evaluation.sampling import Sampling
from evaluation.target import Target
from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, ShardsConfig
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.open import VALIDATION_SPLIT, eval_batches, open_source
from pretrain.data.shards import ShardSource
from pretrain.errors import UserError
from pretrain.gates.suite import run_gates
from pretrain.monitor.environment import describe_environment

GATES, GATES_VERSION = "gates", 1
DEFAULT_BATCH_SIZE = 8
_MAX_SEQ_LEN = 1024
"""Window where neither run nor user says one and the model takes more."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to evaluate on and how. None takes what the run itself used, where the target is one."""

    data: Path | None = None
    split: str | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    max_windows: int | None = None
    baselines: bool = False
    texts: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    sampling: Sampling = SAMPLING
    max_new_tokens: int = 128
    seed: int = 0
    controls: bool = False
    """Tasks needle and perplexity: run every control as well."""
    null: str | None = None
    """Task needle: a run of the matched adapter without memory."""
    sets: tuple[str, ...] = ()
    """Task needle: changes of the task."""
    heads: tuple[str, ...] = ()
    """Encoders: `HEAD` or `HEAD:DIM`; none: every head."""
    pool: int | None = None
    """Task retrieval on a split of pairs: passages searched."""


def evaluate_perplexity(target: Target, request: Request, command: list[str]) -> Results:
    """Loss, perplexity, bits per byte and accuracy, with n-gram baselines and texts where asked for.

    On a run's own validation data, without `max_windows`, it evaluates the very windows that training evaluates. With
    `controls`, perplexities of `bracketed` stand beside it.

    Raises:
        UserError: no language model, no data, or data made with another tokenizer.
    """
    if target.config is not None and target.config.model.kind != "causal_lm":
        raise UserError(f"{target.path}: task perplexity needs a causal language model, this is an "
                        f"{target.config.model.kind}")
    source, seq_len = open_data(target, request)
    data = ValidationData(source, read_token_bytes(source))
    size = request.batch_size or (_batch(target).micro_batch_size if target.manifest else DEFAULT_BATCH_SIZE)
    windows = _windows(target, request)
    batches = list(eval_batches(source, rank=0, world=1, batch_size=size, max_samples=windows))
    sums = perplexity.tally(target.forward, batches, target.device, data.token_bytes)
    prefix = request.split or perplexity.PREFIX
    result = perplexity.figures(sums, has_bytes=data.token_bytes is not None, seed=request.seed, prefix=prefix)
    meanings = {}
    for name, meaning, metric in bracketed(target, batches, request.seed) if request.controls else ():
        meanings[name] = meaning
        result.metrics[f"{prefix}/perplexity/{name}"] = metric
    baselines = _baselines(target, batches, data.token_bytes) if request.baselines else []
    texts = continue_windows(target, source, request) if request.texts else []
    dataset = {"split": "?", "fingerprint": source.fingerprint, "seq_len": seq_len,
               "windows": min(windows or len(source), len(source))}
    if isinstance(source, ShardSource):
        dataset |= {"path": str(source.manifest.folder), "split": source.split.name,
                    "fingerprint": source.manifest.fingerprint}
    return Results(task=perplexity.TASK, task_version=perplexity.VERSION, metrics=records(result), baselines=baselines,
                   samples=texts, dataset=dataset, batch_size=size, seed=request.seed,
                   details={"brackets": meanings} if meanings else {}, **about(target, command))


def evaluate_gates(target: Target, request: Request, command: list[str]) -> Results:
    """The gates of the model: causality, padding, documents, decode = forward, random tokens."""
    seq_len = min(64, target.max_seq_len or 64)
    outcomes = run_gates(target.module, vocab_size=target.vocab_size, seq_len=seq_len, seed=request.seed,
                         device=target.device)
    passed = [outcome.passed for outcome in outcomes]
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    return Results(
        task=GATES, task_version=GATES_VERSION, passed=not failed, batch_size=1, seed=request.seed,
        failure=f"failed {', '.join(failed)}" if failed else None,
        metrics={"gates/passed": MetricRecord(value=float(sum(passed)), n=len(passed), higher_is_better=True)},
        details={o.name: asdict(o) for o in outcomes}, **about(target, command))


def open_data(target: Target, request: Request) -> tuple[SampleSource, int]:
    """(validation windows, their length): of the run, or of `request.data`, whose tokenizer must be the target's."""
    config = target.config
    seq_len = request.seq_len or (config.data.seq_len if config else min(target.max_seq_len or _MAX_SEQ_LEN,
                                                                         _MAX_SEQ_LEN))
    if target.max_seq_len is not None and seq_len > target.max_seq_len:
        raise UserError(f"--seq-len {seq_len} is above the {target.max_seq_len} tokens that the model takes")
    if config is not None and request.data is None and request.split is None:
        own = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})
        return ValidationData.open(own).source, seq_len
    path = request.data or (Path(config.data.source.path) if config and isinstance(config.data.source, ShardsConfig)
                            else None)
    if path is None:
        raise UserError(f"{target.path}: give --data DIR, a dataset prepared with this model's tokenizer")
    shards = ShardsConfig(path=str(path), split=request.split or VALIDATION_SPLIT)
    masking = config.data.document_masking if config else True
    source = open_source(shards, DataConfig(seq_len=seq_len, source=shards, document_masking=masking))
    assert isinstance(source, ShardSource)
    check_tokenizer(target, source)
    return source, seq_len


def check_tokenizer(target: Target, source: ShardSource) -> None:
    """Raise UserError where the data was tokenized with another tokenizer than the model's."""
    theirs = source.manifest.tokenizer_sha256
    if target.tokenizer_sha256 is None:
        if source.manifest.vocab_size > target.vocab_size:
            raise UserError(f"{source.manifest.folder}: has {source.manifest.vocab_size} token ids, the model "
                            f"{target.vocab_size}: it was tokenized with another tokenizer")
    elif theirs is not None and theirs != target.tokenizer_sha256:
        raise UserError(f"{source.manifest.folder}: was tokenized with another tokenizer ({theirs[:12]}) than "
                        f"{target.path} uses ({target.tokenizer_sha256[:12]}); prepare it with the model's own")


def continue_windows(target: Target, source: SampleSource, request: Request) -> list[TextSample]:
    """Continue the beginnings of windows spread over the source, as text.

    Raises UserError where the target has no tokenizer.
    """
    if target.tokenizer is None:
        raise UserError(f"{target.path}: has no tokenizer.json, so no text can be written")
    given = prompts(source, request.texts, request.prompt_tokens)
    new = generate(target.forward, given, Limits(request.max_new_tokens, target.eos_id, target.max_seq_len),
                   request.sampling, vocab_size=target.vocab_size, device=target.device)
    decode = target.tokenizer.decode
    return [TextSample(prompt=decode(p), text=decode(t)) for p, t in zip(given, new, strict=True)]


def default_folder(target: Target, request: Request, results: Results) -> Path | None:
    """Where results of a run go: below RUN/eval, named by what changes them; None for targets outside of runs."""
    if target.run_folder is None:
        return None
    parts = [f"step-{results.step}", results.task, results.prefix if results.dataset else "", results.dtype,
             str(results.dataset["fingerprint"])[:8] if request.data else "",
             f"{request.seq_len}-tokens" if request.seq_len else "",
             f"{request.max_windows}-windows" if request.max_windows else "",
             "baselines" if results.baselines else "", "controls" if request.controls else "",
             *(re.sub(r"[^A-Za-z0-9.=_-]", "", text.rpartition("source.")[2]) for text in request.sets)]
    return target.run_folder.eval_dir / "-".join(part for part in parts if part)


def _batch(target: Target) -> ResolvedBatch:
    """The batch equation of the run that wrote the checkpoint."""
    assert target.config is not None and target.manifest is not None
    return target.config.batch.resolve(target.manifest.world)


def _windows(target: Target, request: Request) -> int | None:
    """How many windows: as asked, else as many as the run evaluates on its own data, else all."""
    if request.max_windows is not None or target.config is None or request.data or request.split:
        return request.max_windows
    if target.manifest is None:
        return None
    return perplexity.max_samples(target.config.eval.max_batches, _batch(target).global_batch_size)


def _baselines(target: Target, batches: list[Batch], token_bytes: np.ndarray | None) -> list[NGramRecord]:
    if target.config is None or target.manifest is None:
        raise UserError(f"{target.path}: n-gram baselines need the training data of a run; give the run")
    return ngram_baselines(target.config, _batch(target), batches, token_bytes, samples=_samples(target))


def _samples(target: Target) -> int:
    """Windows the weights were trained on."""
    assert target.manifest is not None
    return target.manifest.k * _batch(target).global_batch_size


def about(target: Target, command: list[str]) -> dict[str, Any]:
    """The fields of results that say what was evaluated, where and how."""
    environment = describe_environment()
    trained = _samples(target) * target.config.data.seq_len if target.config and target.manifest else None
    return {
        "target": str(target.path), "dtype": target.dtype, "command": shlex.join(command),
        "model": {"family": target.family, "parameters": target.parameters(), "kind": target.kind},
        "step": target.checkpoint.step if target.checkpoint else target.provenance.get("step"),
        "train_tokens": trained or target.provenance.get("train_tokens"), "weights_sha256": target.weights_sha256,
        "host": {**{k: environment[k] for k in ("host", "platform", "python", "packages", "hardware", "source")},
                 "device": str(target.device), "threads": torch.get_num_threads()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
