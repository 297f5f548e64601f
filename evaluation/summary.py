"""`metrics.json`: the final figures of a run under the names of AFRB's specification (sections 12 and 23).

Made from the run folder alone, so it can be made again at any time: after training, after each later evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.needle import LOWER_IS_BETTER, TASK, nulls
from evaluation.report_data import ReportData, collect
from evaluation.results import MetricRecord, Results
from pretrain.config.load import load_run_config
from pretrain.config.needle import NeedleConfig
from pretrain.config.run import RunConfig
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic

NEEDLE = ("needle_hit_rate", "needle_hit_rate_topk", "needle_hit_rate_tf", "needle_exact_match",
          "avg_correct_tokens_per_needle", "needle_partial_success_rate", "needle_bag_rate", *LOWER_IS_BETTER)
PHASE = ("phase_coherence", "phase_lock", "entropy_flow", "gamma_saturation", "gamma_saturated_frac",
         "pvm_gate_strength", "pvm_gate_delta", "pvm_memory_norm")
_NOT_MEASURED = "not measured in this run"
_FINDING = re.compile(r"\[DIAG:\w+\] .*")


def write_summary(run_folder: Path) -> Path:
    """Write RUN/metrics.json and return its path. Raises UserError where there is no run folder."""
    folder = RunFolder.open(run_folder)
    write_json_atomic(folder.metrics_json, summary(folder))
    return folder.metrics_json


def summary(folder: RunFolder) -> dict[str, Any]:
    """The final figures. What is not known, or not finite, is null; `reasons` says why, by key."""
    data, config = collect(folder), load_run_config(folder.config_file).config
    last = _last(data)
    results = {task: _newest(data.results, task) for task in (TASK, "perplexity")}
    count = config.model.parameter_count()
    found: dict[str, Any] = {
        "task": TASK if isinstance(config.data.source, NeedleConfig) else "language", "preset": _preset(data, config),
        "seed": config.seed, "steps": last.get("step"), "world_size": _world(folder), "model": _model(config),
        "params_total": count.total, "params_trainable": count.trainable, "train_loss": last.get("loss"),
        "val_loss": last.get("val/loss"), "test_ppl": _value(results["perplexity"], "test/perplexity"),
        **_needle(config, results[TASK], last),
        **{name: last.get(f"val/{name}", last.get(name)) for name in PHASE},
        "ridge": {key.removeprefix("ridge/"): value for key, value in last.items() if key.startswith("ridge/")},
        "infonce": _infonce(config, last), "block_profile": _blocks(config, last), **_reach(config),
        "diagnostics": _findings(folder, results[TASK]), "command": data.environment.get("command"),
        "args": data.config, "timing": _timing(data), "source": data.environment.get("source")}
    return _finite(found)


def _needle(config: RunConfig, result: Results | None, last: Mapping[str, float]) -> dict[str, Any]:
    """From the evaluation afterwards, else from the last one in training; `needle_split` says which."""
    if not isinstance(config.data.source, NeedleConfig):
        return dict.fromkeys(NEEDLE)
    metrics = {} if result is None else result.metrics
    split = "val" if result is None else result.prefix
    found: dict[str, Any] = {"needle_split": split}
    for name in NEEDLE:
        record = metrics.get(f"{split}/{name}")
        found[name] = record.value if record else last.get(f"val/{name}")
        ci = (last.get(f"val/{name}/low"), last.get(f"val/{name}/high"))
        found[f"{name}_ci"] = record.ci if record else None if None in ci else ci
    found["needle_top5_hit"] = found["needle_hit_rate_topk"]
    ladder = nulls(config.data.source)
    details = {} if result is None else result.details
    rows = [*details.get("controls", ()), *details.get("references", ())]
    return {**found, "nulls": {"uniform": ladder.uniform, "context_bag": ladder.context_bag,
                               "needle_bag": ladder.needle_bag},
            "controls": {row["name"]: {"rate": row["value"], "ci": row["ci"], "n": row["n"]} for row in rows},
            "verdict": details.get("verdict")}


def _infonce(config: RunConfig, last: Mapping[str, float]) -> dict[str, Any] | None:
    negatives = getattr(config.objective, "infonce_negatives", None)
    if negatives is None or not getattr(config.objective, "infonce_weight", 0):
        return None
    return {"loss": last.get("infonce_loss"), "acc": last.get("infonce_acc"), "chance": math.log(1 + negatives)}


def _preset(data: ReportData, config: RunConfig) -> str:
    """What was trained: the preset or file of the command, whatever the run is called."""
    command = data.environment.get("command") or []
    after = command.index("train") + 1 if "train" in command else len(command)
    return Path(command[after]).stem if after < len(command) else config.name


def _model(config: RunConfig) -> str:
    """The family, and the backbone that it stands on."""
    backbone = getattr(config.model, "backbone", None)
    if backbone is None:
        return config.model.family
    return f"{config.model.family} on {backbone.weights or backbone.architecture}"


def _blocks(config: RunConfig, last: Mapping[str, float]) -> list[dict[str, float]]:
    """Alpha, gamma, omega and phi of each block, where the family has blocks: as last measured, else as it began."""
    profile = getattr(config.model, "block_profile", None)
    blocks: list[dict[str, float]] = profile() if profile is not None else []
    return [{key: last.get(f"val/block_{number}/{key}", value) for key, value in block.items()}
            for number, block in enumerate(blocks, 1)]


def _reach(config: RunConfig) -> dict[str, float | None]:
    """What a decaying memory keeps of the nearest needle."""
    beta, source = getattr(config.model, "pvm_beta", None), config.data.source
    known = isinstance(source, NeedleConfig) and beta is not None and getattr(config.model, "enable_pvm", False)
    return {"beta_at_min_distance": beta**source.min_distance if known else None}  # type: ignore[operator,attr-defined]


def _findings(folder: RunFolder, result: Results | None) -> list[str]:
    """Findings of the log, each once, and of the last evaluation."""
    text = folder.log_file.read_text(encoding="utf-8", errors="replace") if folder.log_file.is_file() else ""
    return list(dict.fromkeys([*_FINDING.findall(text), *(result.details.get("findings", ()) if result else ())]))


def _newest(results: list[Results], task: str) -> Results | None:
    """The evaluation of the newest weights, with controls before those without."""
    return max((r for r in results if r.task == task), default=None,
               key=lambda r: (r.step or 0, bool(r.details.get("controls")), r.created))


def _last(data: ReportData) -> dict[str, float]:
    """The last value of every metric."""
    found: dict[str, float] = {}
    for row in data.rows:
        found |= {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return found


def _value(result: Results | None, name: str) -> float | None:
    record: MetricRecord | None = result.metrics.get(name) if result else None
    return record.value if record else None


def _world(folder: RunFolder) -> int | None:
    from pretrain.runfolder.publish import Manifest
    known = folder.checkpoints()
    return Manifest.read(known[0].path).world if known else None


def _timing(data: ReportData) -> dict[str, float]:
    """Seconds by phase of the loop, and the median rate."""
    keys = {key for row in data.rows for key in row if key.startswith("time/")}
    timing = {key.removeprefix("time/"): sum(data.column(key)[1]) for key in sorted(keys)}
    rates = sorted(data.column("tokens_per_second")[1])
    return {**timing, **({"tokens_per_second": rates[len(rates) // 2]} if rates else {})}


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN, and null has no reason of its own."""
    reasons: dict[str, str] = {}

    def clean(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, f"{path}.{key}" if path else key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item, path) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            reasons[path] = str(value)
            return None
        if value is None and "." not in path:
            reasons.setdefault(path, _NOT_MEASURED)
        return value
    cleaned: dict[str, Any] = clean(found, "")
    return {**cleaned, "reasons": reasons}
