"""`pretrain train --dry-run`: what a run would be, without touching anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.cli.plan_text import assumed_device, assumed_speed, plan_lines, resolve_precision, training_samples
from pretrain.config.deepspeed import deepspeed_config
from pretrain.config.load import LoadedConfig, dump_yaml
from pretrain.config.plan import make_plan, never_counts

if TYPE_CHECKING:
    from rich.console import Console


def dry_run(loaded: LoadedConfig, world: int, console: Console | None = None) -> None:
    """Print the resolved config with origins, then parameters, memory a rank, steps, tokens and hours.

    Reads the dataset's manifest where there is one; writes nothing, starts nothing, imports no torch. Raises
    ConfigError for what would stop the run as well: a batch that does not divide over `world` ranks, DeepSpeed keys
    that contradict another section.
    """
    from rich.console import Console
    config = loaded.config
    facts = assumed_device(None)
    precision, reason = resolve_precision(config, facts)
    samples, data_name = training_samples(config)
    plan = make_plan(config, world, precision=precision, device=facts.kind, epoch_samples=samples,
                     speed=assumed_speed(config, precision))
    deepspeed_config(config, plan.batch, precision, on_cuda=facts.kind == "cuda")
    lines = [dump_yaml(loaded), *plan_lines(plan, precision_reason=reason, data_name=data_name)]
    lines += never_counts(config, plan.batch, plan.steps)
    (console or Console()).print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
