"""Why an update was not finite: the batch once more without gradient, each module looked at, and a file for each rank.

The update has been skipped by then on every rank, so all of them come here together.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.data.loader import Update as LoadedUpdate
from pretrain.engine import rng
from pretrain.engine.build import Engine
from pretrain.engine.probe import own_parts
from pretrain.engine.update import Update, without_gradient

_MOST = 10
"""Updates that one start of a run explains; a run that goes on in spite of more fills no disk."""
_TOLD = 4
"""Ranks named on the console."""
_log = logging.getLogger("pretrain")


@dataclass
class Finding:
    """What one rank has seen."""

    weight: str | None = None
    """First parameter of which the part here is not finite."""
    module: str | None = None
    """First module, in the order they finish, of which an output is not finite."""
    inputs_finite: bool = True
    """Whether all inputs of that module were."""
    terms: dict[str, float] = field(default_factory=dict)
    """Losses and metrics of the second run, this rank's."""

    @property
    def found(self) -> bool:
        """Whether this rank has something to show."""
        return self.weight is not None or self.module is not None

    def __str__(self) -> str:
        if self.weight is not None:
            return f"weights of {self.weight} are not finite"
        source = "its inputs are" if self.inputs_finite else "nor are its inputs"
        return f"{self.module}: output not finite, {source}"


class Examiner:
    """Explains the updates of a run that were not finite."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the files go."""
        self._folder = folder
        self._left = _MOST

    def examine(self, engine: Engine, objective: Any, loaded: LoadedUpdate, update: Update, *, step: int,
                total_steps: int, lr: float, controls: Mapping[str, float], before: dict[str, Tensor]) -> None:
        """Say on the console which module it began in, and keep the batch. Collective; generators stay as they are.

        `before` is this rank's random state before the update. A rank that found nothing writes nothing, unless none
        has: then gradients alone were not finite, and all of them do. A file is a safetensors file: the tensors and
        sample ids of each micro-batch, the random state as `rng/...`, and JSON under `about`. In fp16 a finite loss
        with such a gradient is how the loss scale is found, and explains itself.
        """
        if not self._left or (engine.precision == "fp16" and engine.world.agree(_loss_is_finite(update))):
            return
        self._left -= 1
        with rng.preserved():
            rng.restore(before)
            finding = look(engine, objective, loaded, step=step, total_steps=total_steps, controls=controls)
        findings = engine.world.gather_objects(finding)
        somewhere = any(each.found for each in findings)
        if engine.world.is_main:
            for line in _lines(findings):
                _log.warning("[NaN DEBUG] batch %d: %s", loaded.k, line)
            if not self._left:
                _log.warning("[NaN DEBUG] %d explained; later ones are only counted", _MOST)
        if finding.found or not somewhere:
            about = {"k": loaded.k, "step": step, "rank": engine.world.rank, "ranks": engine.world.size, "lr": lr,
                     "controls": dict(controls), "loss": update.loss, "grad_norm": update.outcome.grad_norm,
                     **asdict(finding)}
            self._write(loaded, about, before)

    def _write(self, loaded: LoadedUpdate, about: dict[str, Any], before: dict[str, Tensor]) -> None:
        tensors = {f"micro-{number}/{name}": value.detach().cpu().contiguous()
                   for number, batch in enumerate(loaded.micro_batches)
                   for name, value in {**batch.tensors, "sample_ids": batch.sample_ids}.items()}
        tensors |= {f"rng/{name}": value.contiguous() for name, value in before.items()}
        path = self._folder / f"batch-{loaded.k}-rank-{about['rank']}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"about": json.dumps(about, default=str)})
        except (OSError, SafetensorError) as error:  # a full disk is no reason to stop for
            _log.warning("%s: could not be written (%s)", path, error)
        else:
            _log.warning("[NaN DEBUG] batch %d of rank %d is in %s", loaded.k, about["rank"], path)


def _loss_is_finite(update: Update) -> bool:
    return math.isfinite(update.metrics["loss"][0]) if update.loss is None else math.isfinite(update.loss)


def look(engine: Engine, objective: Any, loaded: LoadedUpdate, *, step: int, total_steps: int,
         controls: Mapping[str, float]) -> Finding:
    """Run the batch again, forward only, and find what is not finite first. Collective.

    Of outputs, `-inf` passes: masks are made of it.
    """
    finding = Finding(weight=next((name for name, part in own_parts(engine) if not bool(torch.isfinite(part).all())),
                                  None))
    with _watched(engine.model, finding):
        finding.terms = without_gradient(engine, objective, loaded.micro_batches, controls, step=step,
                                         total_steps=total_steps)
    return finding


@contextmanager
def _watched(model: nn.Module, finding: Finding) -> Iterator[None]:
    def look_at(name: str, args: Any, kwargs: Any, output: Any) -> None:
        if finding.module is None and not _finite(output):
            finding.module, finding.inputs_finite = name, _finite((args, kwargs))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            # Last of all hooks: what another one makes of an output is the module's output.
            hooks.callback(module.register_forward_hook(
                lambda _module, args, kwargs, output, name=name or "the model": look_at(name, args, kwargs, output),
                with_kwargs=True).remove)
        yield


def _finite(value: Any) -> bool:
    return not any(bool((part.isnan() | part.isposinf()).any()) for part in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors anywhere in arguments or outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for member in fields(value):
            yield from _tensors(getattr(value, member.name))


def _lines(findings: Sequence[Finding]) -> list[str]:
    seen = [(rank, finding) for rank, finding in enumerate(findings) if finding.found]
    if not seen:
        return ["weights and outputs of all modules are finite on every rank: the loss or its gradient is not"]
    lines = [f"rank {rank}: {finding}" for rank, finding in seen[:_TOLD]]
    return lines + ([f"and {len(seen) - _TOLD} more ranks"] if len(seen) > _TOLD else [])
