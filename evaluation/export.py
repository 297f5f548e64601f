"""From a checkpoint to a folder that stands alone: weights, config, tokenizer, model card; proven before it appears."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from data_prep.manifest import TOKENIZER
from data_prep.manifest import Manifest as DatasetManifest
from data_prep.tokenizer import TOKENIZER_CONFIG
from evaluation.embedding_eval import tokens_of
from evaluation.encoder_export import Probe, write_sentence_files
from evaluation.model_card import model_card
from evaluation.report_data import read_results
from evaluation.results import Results, leading
from evaluation.target import PROVENANCE, Target, open_target
from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.source import PairsConfig, ShardsConfig
from pretrain.errors import CheckFailed, UserError
from pretrain.models.base import Family
from pretrain.runfolder.publish import hash_file, publish_dir, write_json_atomic, write_text_atomic

FORMAT = 1
SHARD_SIZE = "4GB"
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
"""Largest difference of a logit (of encoders: a coordinate), relative to the largest. Attention kernels differ in their
last bits."""
PROBE_ROWS, PROBE_TOKENS = 2, 64
_CHECK_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Exported:
    """A published export."""

    folder: Path
    largest_difference: float
    """Of a logit, relative to the largest logit, between checkpoint and export; of encoders: of a coordinate."""
    compared: str
    """What was: "logits", or "vectors"."""


def export_run(run: str, *, step: int | None = None, best: bool = False, dtype: str = "fp32", out: Path | None = None,
               native: bool = True, overwrite: bool = False, head: str | None = None) -> Exported:
    """Export a run, or one checkpoint, as a Hugging Face folder.

    The folder is written aside, loaded in a fresh process that compares logits on stored tokens, and only then renamed.
    Of an encoder all vectors are compared, and sentence-transformers can open the folder.

    Args:
        run: run or checkpoint folder.
        step: this checkpoint instead of the newest.
        best: the checkpoint that was best on validation.
        dtype: of the weights, fp32 or bf16.
        out: folder to write; None: RUN/export/step-N-DTYPE.
        native: as the plain transformers architecture, where there is one.
        overwrite: replace a folder that is there.
        head: of an encoder: the vector that sentence-transformers gives, `HEAD` or `HEAD:DIM`; None: the default one.

    Raises:
        UserError: nothing to export, no such head, or the folder is there.
        CheckFailed: the fresh process found other logits; nothing is left behind.
    """
    if dtype not in TOLERANCE:
        raise UserError(f"dtype {dtype}: an export is fp32 or bf16")
    target = open_target(run, dtype=dtype, device=torch.device("cpu"), step=step, best=best)
    if target.config is None or target.checkpoint is None or target.run_folder is None:
        raise UserError(f"{run}: is no run or checkpoint; an export is made from one")
    if head is not None and not target.encodes:
        raise UserError(f"--head {head}: {run} is a language model; heads are those of encoders")
    family: Family = resolve(FAMILIES, target.config.model.family, "model.family")
    is_native = native and family.export is not None
    if out is None:
        name = f"step-{target.checkpoint.step}-{dtype}{'' if is_native else '-wrapped'}"
        out = target.run_folder.export_dir / name
    out = Path(out).resolve()
    if out.exists() and not overwrite:
        raise UserError(f"{out}: is there already; give --overwrite, or another --out")
    model = family.export(target.model) if is_native and family.export is not None else target.model
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_model(model, target, temporary)
        facts = _provenance(target, model, dtype, is_native)
        reference = _reference(target, temporary, facts, head)
        difference = _prove(temporary, facts, reference)
        _write_papers(target, temporary, facts)
        publish_over(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, difference, facts["verification"]["compared"])


def _write_model(model: PreTrainedModel, target: Target, folder: Path) -> None:
    """Weights in shards, config, generation config, and the tokenizer as the dataset has it."""
    if target.encodes:
        model.config.eos_token_id = target.eos_id
        model.config.pad_token_id = tokens_of(target).pad_id if target.tokenizer is not None else None
    elif target.eos_id is not None:
        model.config.eos_token_id = target.eos_id
        model.generation_config = GenerationConfig(eos_token_id=target.eos_id, pad_token_id=target.eos_id)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    assert target.config is not None
    source = target.config.data.source
    if isinstance(source, ShardsConfig | PairsConfig):
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            if (Path(source.path) / name).is_file():
                shutil.copyfile(Path(source.path) / name, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone


def _provenance(target: Target, model: PreTrainedModel, dtype: str, native: bool) -> dict[str, Any]:
    """Where the weights come from."""
    config, manifest, checkpoint = target.config, target.manifest, target.checkpoint
    assert config is not None and manifest is not None and checkpoint is not None
    batch = config.batch.resolve(manifest.world)
    dataset: dict[str, Any] = {}
    if isinstance(config.data.source, ShardsConfig | PairsConfig):
        data = DatasetManifest.read(Path(config.data.source.path))
        stated = {key: value for key, value in data.provenance.items() if key != "paths"}
        splits = {name: {"docs": s.docs, "tokens": s.tokens, "bytes": s.bytes} for name, s in data.splits.items()}
        dataset = {"fingerprint": data.fingerprint, "provenance": stated, "splits": splits}
    return {
        "format": FORMAT, "run": config.name, "step": checkpoint.step, "k": manifest.k, "dtype": dtype,
        "native": native,
        "train_tokens": manifest.k * batch.global_batch_size * config.data.seq_len,
        "checkpoint_manifest_sha256": target.weights_sha256, "architecture": type(model).__name__,
        "module": type(target.model).__module__, "model": {"family": target.family, "parameters": target.parameters()},
        "document_masking": config.data.document_masking, "dataset": dataset,
        "tokenizer_sha256": target.tokenizer_sha256, "controls": dict(target.controls),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@torch.no_grad()
def _reference(target: Target, folder: Path, facts: dict[str, Any], head: str | None) -> dict[str, torch.Tensor]:
    """Stored tokens and what the checkpoint makes of them; of an encoder also writes how texts become vectors."""
    if target.encodes:
        probe = Probe.of(target)
        facts["encoder"] = write_sentence_files(target, probe.cut(head), folder)
        return probe.tensors()
    tokens = _probe_tokens(target)
    return {"input_ids": tokens,
            "logits": target.forward(input_ids=tokens, return_logits=True).logits.float().contiguous()}


def _prove(folder: Path, facts: dict[str, Any], reference: dict[str, torch.Tensor]) -> float:
    """Load `folder` in a fresh process and compare its logits, or vectors, with the checkpoint's on stored tokens.

    Returns the largest difference, relative to the largest of them. Raises CheckFailed.
    """
    what = "logits" if "logits" in reference else "vectors"
    file = folder.with_name(folder.name + ".probe")
    save_file(reference, file)
    limit = TOLERANCE[facts["dtype"]]
    try:
        difference = _fresh_process(str(folder), str(file), facts["dtype"],
                                    "" if facts["native"] else facts["module"], json.dumps(facts["controls"]))
    finally:
        file.unlink(missing_ok=True)
    if not difference <= limit:
        raise CheckFailed(f"{folder}: loaded in a fresh process it gives {what} that differ by {difference:.3g} of the "
                          f"largest, {limit:g} is allowed for {facts['dtype']}; nothing was written")
    facts["verification"] = {"tokens": reference["input_ids"].numel(), "compared": what,
                             "largest_difference": difference, "tolerance": limit}
    return difference


def _fresh_process(folder: str, reference: str, dtype: str, module: str, controls: str) -> float:
    """`verify_export.largest_difference` in a new interpreter. Raises CheckFailed where that cannot load the export."""
    command = [sys.executable, "-P", "-m", "evaluation.verify_export", folder, reference, dtype, module,
               controls]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{folder}: loading the export in a fresh process took over {_CHECK_TIMEOUT:g} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckFailed(f"{folder}: the export cannot be loaded in a fresh process ({last}); nothing was written")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["largest_difference"])


def _probe_tokens(target: Target) -> torch.Tensor:
    """[rows, tokens] of the micro-batch that the checkpoint stores to prove itself."""
    assert target.checkpoint is not None
    stored = load_file(target.checkpoint.path / "probe.safetensors")["input_ids"]
    return stored[:PROBE_ROWS, :PROBE_TOKENS].clone()


def _write_papers(target: Target, folder: Path, facts: dict[str, Any]) -> None:
    """Training config, model card, and provenance with the hash of every other file."""
    assert target.run_folder is not None
    config_text = target.run_folder.config_file.read_text(encoding="utf-8")
    write_text_atomic(folder / "training_config.yaml", config_text)
    write_text_atomic(folder / "README.md", model_card(facts, newest_result(target), config_text))
    facts["files"] = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    write_json_atomic(folder / PROVENANCE, facts)


def newest_result(target: Target) -> Results | None:
    """The evaluation that speaks for these very weights."""
    assert target.run_folder is not None
    return leading(r for r in read_results(target.run_folder.eval_dir) if r.weights_sha256 == target.weights_sha256)


def publish_over(temporary: Path, out: Path) -> None:
    """Rename the finished folder; what it replaces is moved aside first and removed last."""
    old = out.with_name(f".old-{out.name}-{os.getpid()}")
    if out.exists():
        os.rename(out, old)
    publish_dir(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
