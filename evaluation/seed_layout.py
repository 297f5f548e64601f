"""Checkpoints of a run under the names of the first Spectra scripts: best_sts.pt, best_val.pt, final.pt, step-N.pt.

Each file is one dict that `torch.load(file, weights_only=True)` reads: no object in it but tensors, numbers and text.

    format   1
    model    name -> tensor, fp32 on the CPU, a tied weight under each of its names
    config   the model's section of the config, JSON text
    run      the whole resolved config, JSON text
    metrics  name -> number: what was evaluated and logged at this step
    step     updates applied
    micro_step  micro-steps done by then, which the first scripts call steps

Optimizer state stays in the run folder: a run goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluation.export import publish_over
from evaluation.report_data import read_results
from evaluation.target import Target, open_target
from pretrain.config.interval import Progress
from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.config.sections import plain
from pretrain.errors import UserError
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.layout import CheckpointRef, RunFolder, is_run_folder
from pretrain.runfolder.publish import Manifest, fsync
from pretrain.runfolder.status import Status

FORMAT = 1
STS_METRIC = "val/sts_spearman"
BEST_STS, BEST_VAL, FINAL = "best_sts.pt", "best_val.pt", "final.pt"


@dataclass(frozen=True, slots=True)
class Written:
    """What was exported."""

    folder: Path
    files: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a file that the first scripts would have, and why it is not there."""


def export_seed_layout(run: str, *, out: Path | None = None, overwrite: bool = False) -> Written:
    """Write every checkpoint of a run as one file of plain tensors.

    A run selects its best model by one metric, `eval.metric`: by STS it is best_sts.pt, by anything else best_val.pt.
    N of step-N.pt is the multiple of `checkpoint.every` that was due, in its own unit.

    Args:
        run: run folder.
        out: folder to write; None: RUN/export/seed.
        overwrite: replace a folder that is there.

    Raises:
        UserError: no run, no checkpoint, the folder is there, or cannot be written.
        DataCorruption: a checkpoint whose files are not those of its manifest.
    """
    if not is_run_folder(Path(run)):
        raise UserError(f"{run}: is no run; --layout seed writes the checkpoints of one")
    folder = RunFolder.open(Path(run))
    refs = folder.checkpoints()
    if not refs:
        raise UserError(f"{run}: has no checkpoint yet")
    out = (out or folder.export_dir / "seed").resolve()
    if out.exists() and not overwrite:
        raise UserError(f"{out}: is there already; give --overwrite, or another --out")
    config = load_run_config(folder.config_file).config
    written = Written(out)
    named: dict[str, list[str]] = {}
    for name, ref in _names(folder, config, refs, written):
        named.setdefault(ref.path.name, []).append(name)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for ref in refs:
            names = named.get(ref.path.name, [])
            if names:
                content = _content(open_target(str(ref.path), device=torch.device("cpu")), folder)
                for name in names:
                    with (temporary / name).open("wb") as file:
                        torch.save(content, file)
                    fsync(temporary / name)
                    written.files.append(name)
        publish_over(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written.files.sort()
    return written


def _names(folder: RunFolder, config: RunConfig, refs: list[CheckpointRef],
           written: Written) -> Iterator[tuple[str, CheckpointRef]]:
    """Names of files and the checkpoints that they are of; what cannot be is told in `written.missing`."""
    metric = config.eval.metric
    best = folder.read_pointer(f"best-{metric}")
    here, other = (BEST_STS, BEST_VAL) if metric == STS_METRIC else (BEST_VAL, BEST_STS)
    if best is not None:
        yield here, best
    else:
        written.missing[here] = f"no checkpoint is marked best on {metric}"
    written.missing[other] = f"the run selects by eval.metric {metric}"
    status = Status.read(folder)
    latest = folder.read_pointer("latest") or refs[0]
    if status is not None and status.state == "done":
        yield FINAL, latest
    else:
        written.missing[FINAL] = "the run has not come to its end"
    for ref in refs:
        yield f"step-{_due(config, Manifest.read(ref.path))}.pt", ref


def _due(config: RunConfig, manifest: Manifest) -> int:
    """The multiple of `checkpoint.every` that a checkpoint stands for; its step for one at no multiple."""
    every, batch = config.checkpoint.every, config.batch.resolve(manifest.world)
    if every is None or every.unit not in ("steps", "micro_steps"):
        return manifest.step
    gas = batch.gradient_accumulation_steps
    done = Progress(steps=manifest.step, micro_steps=manifest.step * gas)
    before = Progress(steps=manifest.step - 1, micro_steps=(manifest.step - 1) * gas)
    due = every.due(before, done)
    return int(done.in_unit(every.unit)) if due is None else due


def _content(target: Target, folder: RunFolder) -> dict[str, Any]:
    assert target.config is not None and target.manifest is not None and target.checkpoint is not None
    step, batch = target.checkpoint.step, target.config.batch.resolve(target.manifest.world)
    metrics: dict[str, float] = {}
    for row in read_metrics(folder):
        if row.get("step") == step:
            metrics |= {key: float(value) for key, value in row.items()
                        if isinstance(value, (int, float)) and key not in ("step", "fence") and math.isfinite(value)}
    for results in read_results(folder.eval_dir):
        if results.weights_sha256 == target.weights_sha256:
            metrics |= {name: record.value for name, record in results.metrics.items()}
    return {
        "format": FORMAT,
        "model": {name: tensor.detach() for name, tensor in target.model.state_dict().items()},
        "config": json.dumps(plain(target.config.model)),
        "run": json.dumps(plain(target.config)),
        "metrics": metrics, "step": step, "micro_step": step * batch.gradient_accumulation_steps,
    }
