"""The contract between model families and everything above them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pretrain.config.model import ModelConfig
from pretrain.config.run import OptimConfig, RunConfig


@dataclass
class LMOutput(ModelOutput):
    """Result of a language model's one forward. Sums are fp32 scalars; logits only on request."""

    nll_sum: torch.Tensor | None = None
    """Sum over labelled tokens of the negative log-likelihood in nats."""
    n_tokens: torch.Tensor | None = None
    """Number of labelled tokens (labels != -100), int64."""
    n_correct: torch.Tensor | None = None
    """How many of them were the model's first choice, int64."""
    terms: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Further loss terms as (sum, count), by name."""
    logits: torch.Tensor | None = None
    """[B, T, V] where asked for with `return_logits=True`, else None."""
    past_key_values: Any | None = None
    """State for step-by-step decoding, where asked for with `use_cache=True`."""


@dataclass
class EncoderOutput(ModelOutput):
    """Result of an encoder's forward: one vector a text and head."""

    heads: dict[str, torch.Tensor] | None = None
    """[B, d] by name."""
    default: str | None = None
    """Name of the head that stands for the text where none is asked for."""
    aux: dict[str, Any] | None = None
    """Whatever objectives of this family need beside the heads."""


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Where and how a model is built."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    activation_checkpointing: bool = False
    document_masking: bool = True


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a learning-rate scale, a weight decay and, where they have their own, AdamW's betas."""

    name: str
    params: list[torch.nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One finding about a run: a rule that fired, what it means, what to do."""

    rule: str
    message: str
    remedy: str


class EngineStartContext(Protocol):
    """What `Hooks.before_engine` may use. Called on all ranks, before the engine partitions anything."""

    model: PreTrainedModel
    rank: int
    world_size: int
    device: torch.device
    missing: frozenset[str]
    """Parameters that `Hooks.supplies` and that `train.init_from` does not have."""

    def train_samples(self, n: int) -> Any:
        """The first `n` training samples of the global order as a Batch; the cursor does not move."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""

    def weights(self, source: Path, key: str) -> dict[str, torch.Tensor]:
        """Whole weights by name of a run, a checkpoint or an export, on the CPU of every rank.

        Raises UserError naming the config key where there are none, or of another tokenizer than the data's.
        """

    def full_parameter(self, name: str, write: torch.Tensor | None = None) -> torch.Tensor:
        """The whole parameter on every rank; with `write`, set it on every rank first."""

    def gathered_in_use(self) -> AbstractContextManager[None]:
        """Within it the model can be called: partitioned weights are whole while the module that owns them runs.

        Each call is collective then: all ranks call the same modules in the same order.
        """


class StepContext(Protocol):
    """What `Hooks.after_step` may use."""

    step: int
    rank: int
    world_size: int

    def read(self, name: str) -> torch.Tensor:
        """The full fp32 parameter on every rank."""

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter on every rank: the fp32 master and the model's copy."""


class Hooks:
    """What a family does around training. The default does nothing."""

    def before_engine(self, ctx: EngineStartContext) -> None:
        """Fresh runs only, on all ranks, before the engine starts (calibration, say)."""

    def supplies(self, name: str) -> bool:
        """Whether `before_engine` fills this parameter where `train.init_from` does not have it."""
        return False

    def measured(self) -> dict[str, float]:
        """What `before_engine` found, for the first row of the metrics."""
        return {}

    def controls(self, step: int) -> dict[str, float]:
        """Pure function of the step: ramps, flags, temperatures; passed to forward and to the objective."""
        return {}

    def after_step(self, ctx: StepContext) -> None:
        """After every applied update, on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON scalars that a resume needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


def no_hooks(config: RunConfig) -> Hooks:
    """For families that need none."""
    return Hooks()


def no_diagnostics(model: PreTrainedModel, metrics: Mapping[str, float]) -> list[Diagnosis]:
    """For families that have none."""
    return []


@dataclass(frozen=True, slots=True)
class Family:
    """Everything the rest of the stack knows about a family of models."""

    name: str
    schema: type[ModelConfig]
    build: Callable[[Any, BuildContext], PreTrainedModel]
    parameter_groups: Callable[[PreTrainedModel, OptimConfig], list[ParamGroup]]
    objectives: frozenset[str]
    hooks: Callable[[RunConfig], Hooks] = no_hooks
    diagnostics: Callable[[PreTrainedModel, Mapping[str, float]], list[Diagnosis]] = no_diagnostics
    grad_warn: float | None = None
    """Gradient norm before clipping above which an update is told of; None: only far above its running median."""
    csv_columns: Sequence[str] = ()
    """Leading columns of metrics.csv, in this order; `name=key` shows the metric `key` under another name."""
    export: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    """The model to export in place of ours, where transformers has the architecture natively."""
