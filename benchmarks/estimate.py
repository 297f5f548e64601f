"""`pretrain estimate` beside runs of 2 ranks on this CPU.

Peak memory is the sum over ranks of (peak RSS - RSS after imports), from building the model to the last update.
The bytes of the checkpoint at the end are compared too.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import write_results
from pretrain.config.interval import Interval
from pretrain.config.load import load_run_config
from pretrain.config.machine import memory_bytes
from pretrain.config.plan import make_plan
from pretrain.config.run import Precision
from pretrain.engine.evaluator import EvalResult, Metric, RunView
from pretrain.monitor.memory import current_rss, peak_rss, reset_peak_rss

RANKS, STEPS, SEQ_LEN = 2, 3, 512
GOAL = 0.15
IMPORTS = ("deepspeed", "evaluation.perplexity", "pretrain.models.baseline.family", "pretrain.models.baseline.model",
           "pretrain.models.afrb.family", "pretrain.models.spectra.family", "pretrain.models.spectra.model")
CASES: list[tuple[str, int, Precision, int, int]] = [
    ("baseline-124m", 2, "bf16", 1, 1), ("baseline-124m", 3, "bf16", 1, 1), ("baseline-124m", 2, "fp32", 1, 1),
    ("baseline-124m", 3, "fp32", 1, 1), ("baseline-124m", 2, "bf16", 4, 2), ("baseline-350m", 2, "bf16", 1, 1),
    ("baseline-350m", 3, "bf16", 1, 1)]
"""(preset, ZeRO stage, precision, micro-batch, accumulation)."""


def settings(case: tuple[str, int, Precision, int, int], folder: Path) -> tuple[str, list[str]]:
    """Preset and overrides of a case: synthetic windows, no evaluation, one checkpoint at the end."""
    preset, stage, precision, micro, accumulation = case
    return preset, [
        f"runs_dir={folder}", "data.source={kind: synthetic}", "data.source.vocab_size=30000",
        "data.source.samples=64", f"data.seq_len={SEQ_LEN}", f"train.length={STEPS} steps",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}", "engine.activation_checkpointing=false", "checkpoint.every=null",
        f"batch.global_batch_size={micro * accumulation * RANKS}", f"batch.micro_batch_size={micro}",
        "eval.every=null", "monitor.tensorboard=false", "monitor.progress=off", "monitor.log_every=1 steps"]


class PeakRecorder:
    """An evaluator that evaluates nothing: after the last update it writes this rank's peak beyond its imports."""

    name = "peak"

    def __init__(self, folder: Path) -> None:
        self.every = Interval(STEPS, "steps")
        self.folder = folder
        self.imported = current_rss()
        reset_peak_rss()

    def evaluate(self, view: RunView) -> EvalResult:
        """Note the peak of everything since construction, which is before the model is built."""
        figures = {"beyond": peak_rss() - self.imported, "imports": self.imported}
        (self.folder / f"rank-{view.rank}.json").write_text(json.dumps(figures))
        return EvalResult({"val/loss": Metric(0.0, 1, higher_is_better=False)})  # of which a best checkpoint is chosen


def rank(preset: str, sets: list[str], folder: Path) -> None:
    """One rank of `pretrain train`, with everything imported before its resident set is noted."""
    for name in IMPORTS:
        importlib.import_module(name)
    from pretrain.cli import train

    train.evaluators = lambda config: [PeakRecorder(folder)]
    train.report = lambda loaded: None
    train.train(preset=preset, sets=sets)


def peaks(preset: str, sets: list[str], folder: str) -> list[dict[str, int]]:
    """Of each rank of a run: bytes beyond its imports at the peak, and of the imports."""
    return figures_of_ranks("benchmarks.estimate", "rank", preset, json.dumps(sets), folder)


def figures_of_ranks(module: str, *words: str) -> list[dict[str, Any]]:
    """What each of the ranks of `module` has left in the folder that its last word names."""
    from pretrain.engine.launcher import launch, worker_command
    code = launch(worker_command(module, *words), RANKS, threads=1)
    if code:
        raise SystemExit(f"{module} {words}: the ranks ended with code {code}")
    folder = words[-1]
    return [json.loads((Path(folder) / f"rank-{number}.json").read_text()) for number in range(RANKS)]


def measure(case: tuple[str, int, Precision, int, int]) -> dict[str, Any]:
    """Estimate and measured peak of one case, in bytes over both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        preset, sets = settings(case, Path(folder))
        plan = make_plan(load_run_config(preset, sets).config, RANKS, precision=case[2], device="cpu")
        found = peaks(preset, sets, folder)
        saved = sum(path.stat().st_size for path in Path(folder).glob("*/checkpoints/step-*/**/*") if path.is_file())
    estimated, measured = RANKS * plan.memory.device_bytes, sum(figures["beyond"] for figures in found)
    return {"estimated": estimated, "measured": measured, "ratio": estimated / measured, "phase": plan.memory.peak,
            "ranks": [figures["beyond"] for figures in found], "imports": [figures["imports"] for figures in found],
            "checkpoint": {"estimated": plan.checkpoint_bytes, "measured": saved},
            "terms": {term.name: term.bytes for term in plan.memory.phases[plan.memory.peak]}}


def main() -> None:
    """All cases that this machine has room for."""
    results: dict[str, Any] = {}
    for case in CASES:
        preset, stage, precision, micro, accumulation = case
        name = f"{preset} ZeRO-{stage} {precision} {micro}x{accumulation}x{RANKS}"
        with tempfile.TemporaryDirectory() as folder:
            config = load_run_config(*settings(case, Path(folder))).config
        need = RANKS * make_plan(config, RANKS, precision=precision, device="cpu").memory.device_bytes
        if need > 0.8 * memory_bytes():
            results[name] = {"skipped": "not enough memory here", "estimated": need}
            continue
        results[name] = found = measure(case)
        verdict = "ok" if abs(found["ratio"] - 1) <= GOAL else "OFF"
        print(f"{name:<44} estimated {found['estimated'] / 2**30:6.2f} GiB, "
              f"measured {found['measured'] / 2**30:6.2f} GiB, ratio {found['ratio']:.3f} {verdict}; "
              f"checkpoint {found['checkpoint']['estimated'] / found['checkpoint']['measured']:.3f}", flush=True)
    write_results("estimate", {"goal": f"within {GOAL:.0%}", "cases": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
