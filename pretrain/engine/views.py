"""What evaluators and family hooks see of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.open import TrainingData
from pretrain.engine.build import Engine
from pretrain.engine.consolidate import weights_at
from pretrain.engine.distributed import World
from pretrain.engine.initial import check_initial


class TrainingView:
    """`RunView` of a run in training."""

    def __init__(self, config: RunConfig, step: int, engine: Engine, controls: Mapping[str, float]) -> None:
        self.config = config
        self.step = step
        self.rank = engine.world.rank
        self.world = engine.world.size
        self.device = engine.world.device
        self.zero_gradients = engine.zero_gradients
        self._engine = engine
        self._controls = controls

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """The model in eval mode without gradient; collective. `controls` come on top of those of this step."""
        return self._engine.forward(**inputs, controls={**self._controls, **(controls or {})})

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


class FamilyStartContext:
    """`EngineStartContext`: before DeepSpeed takes the model."""

    def __init__(self, model: PreTrainedModel, world: World, partitioned: bool, data: TrainingData,
                 missing: frozenset[str]) -> None:
        self.model = model
        self.missing = missing
        self.rank = world.rank
        self.world_size = world.size
        self.device = world.device
        self._world = world
        self._partitioned = partitioned
        self._data = data

    def train_samples(self, n: int) -> Batch:
        """The first `n` training samples of the global order; the cursor does not move."""
        return self._data.samples(n)

    def weights(self, source: Path, key: str) -> dict[str, torch.Tensor]:
        """Whole weights by name of a run, a checkpoint or an export, on the CPU. Collective.

        Raises UserError naming the config key where there are none, or of another tokenizer than the data's.
        """
        self._world.all_or_none(lambda: check_initial(source, self._data.source, key))
        return self._world.all_or_none(lambda: weights_at(source, key))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def full_parameter(self, name: str, write: torch.Tensor | None = None) -> torch.Tensor:
        """The whole parameter on every rank; with `write`, rank 0's value is set on every rank first."""
        from deepspeed.runtime.zero import GatheredParameters
        parameter = self.model.get_parameter(name)
        with GatheredParameters([parameter], modifier_rank=0 if write is not None else None, enabled=self._partitioned):
            if write is not None:
                parameter.data.copy_(write)
                if self.world_size > 1 and not self._partitioned:
                    dist.broadcast(parameter.data, src=0)
            return parameter.detach().clone()

    @contextmanager
    def gathered_in_use(self) -> Iterator[None]:
        """Within it the model can be called: partitioned weights are whole while the module that owns them runs."""
        if not self._partitioned:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters
        open_now: list[AbstractContextManager[Any]] = []

        def gather(module: nn.Module, _inputs: Any) -> None:
            open_now.append(GatheredParameters(list(module.parameters(recurse=False))))
            open_now[-1].__enter__()

        def release(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            open_now.pop().__exit__(None, None, None)

        owners = [module for module in self.model.modules() if next(module.parameters(recurse=False), None) is not None]
        with ExitStack() as hooks:
            for module in owners:
                hooks.callback(module.register_forward_pre_hook(gather).remove)
                hooks.callback(module.register_forward_hook(release, always_call=True).remove)
            yield


class FamilyStepContext:
    """`StepContext`: after an applied update."""

    def __init__(self, engine: Engine, step: int) -> None:
        self.step = step
        self.rank = engine.world.rank
        self.world_size = engine.world.size
        self._engine = engine

    def read(self, name: str) -> torch.Tensor:
        """The full fp32 parameter on every rank."""
        return self._engine.read(name)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter on every rank: the fp32 master and the model's copy."""
        self._engine.write(name, value)
