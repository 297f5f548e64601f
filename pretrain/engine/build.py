"""From a RunConfig to a DeepSpeed engine that is what the config says."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from pretrain.config.deepspeed import built_in_parts, deepspeed_config
from pretrain.config.run import Precision, ResolvedBatch, RunConfig
from pretrain.data.allocator import freed_memory_returned
from pretrain.data.open import spread
from pretrain.engine.distributed import World
from pretrain.engine.traps import (
    float_buffers,
    quiet,
    remove_stale_locks,
    restore_buffers,
    set_partitioned_master,
)
from pretrain.models.base import BuildContext, Family, ParamGroup

_WATCHED = 32
"""Weight matrices whose gradients are looked at."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of an update."""

    applied: bool
    grad_norm: float
    """Global norm before clipping; inf or nan where the update was not finite."""


@dataclass
class Engine:
    """A DeepSpeed engine behind the few operations that training needs. All of them are collective."""

    ds: Any
    model: PreTrainedModel
    stage: int
    precision: Precision
    config: dict[str, Any]
    lr_scales: list[float]
    grad_clip: float
    world: World
    keepalive: Any = field(default=None, repr=False)
    forwards: int = 0
    """Forward passes so far."""
    watch_gradients: bool = False
    """Measure `zero_gradients` of the next update: a gather of some matrices, so for updates that are looked at."""
    zero_gradients: float | None = None
    """Of the last watched update: share of up to 32 weight matrices whose whole gradient was exactly zero."""

    def forward(self, **inputs: Any) -> Any:
        """The model's forward through DeepSpeed's hooks."""
        self.forwards += 1
        return self.ds(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients of one micro-batch, averaged over ranks; `last` closes the update."""
        self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss, scale_wrt_gas=False)
        if not last:
            self.ds.step()

    def step(self, lr: float) -> StepOutcome:
        """Clip, check and apply the accumulated gradients at learning rate `lr` times each group's scale.

        An update whose gradient norm is not finite is skipped on every rank; nothing of it reaches weights or moments.
        """
        for group, scale in zip(self.ds.optimizer.param_groups, self.lr_scales, strict=True):
            group["lr"] = lr * scale
        self.zero_gradients = self._zero_gradients() if self.watch_gradients else None
        if self.stage == 0:
            return self._step_unpartitioned()
        self.ds.step()
        norm = self.ds.get_global_grad_norm()
        return StepOutcome(bool(self.ds.was_step_applied()), float(norm) if norm is not None else float("nan"))

    def _step_unpartitioned(self) -> StepOutcome:
        """Stage 0: gradients are whole and equal on all ranks after the last backward; DeepSpeed checks nothing."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        value = float(norm)
        finite = value == value and value != float("inf")
        if finite and self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, norm)
        if not finite:
            self.ds.zero_grad()  # without gradients the optimizer's step below changes nothing
        self.ds.step()
        return StepOutcome(finite, value)

    def _zero_gradients(self) -> float:
        """Between the last backward and the step. The matrices are spread evenly over the model, always the same."""
        from deepspeed.utils import safe_get_full_grad
        matrices = [p for p in self.model.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) > 1]
        some = [matrices[place] for place in spread(len(matrices), _WATCHED)]
        grads = (p.grad if self.stage == 0 else safe_get_full_grad(p) for p in some)
        return sum(grad is None or not bool(grad.any()) for grad in grads) / max(1, len(some))

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A parameter of the model by its dotted name."""
        return self.model.get_parameter(name)

    def read(self, name: str) -> torch.Tensor:
        """The whole fp32 master of a parameter on every rank; for frozen ones the parameter itself."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param
        parameter = self.parameter(name)
        if self.stage and parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            if value is not None:
                return value.detach().clone()
        with GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().float().clone()

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter on every rank: the fp32 master and the copy that forward uses."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param
        parameter = self.parameter(name)
        if parameter.requires_grad and self.stage == 3:
            set_partitioned_master(parameter, value.to(self.world.device, torch.float32))
        elif parameter.requires_grad and self.stage:
            safe_set_full_fp32_param(parameter, value.to(self.world.device, torch.float32))
        with GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(value.to(parameter.dtype))

    def release(self) -> None:
        """Free DeepSpeed's buffers and hooks (several engines live one after another in a test)."""
        self.ds.destroy()
        gc.collect()


def build_engine(config: RunConfig, family: Family, batch: ResolvedBatch, precision: Precision, world: World,
                 model: PreTrainedModel, ds_config: dict[str, Any], keepalive: Any = None) -> Engine:
    """Give a built model to DeepSpeed. Collective."""
    import deepspeed

    quiet()
    remove_stale_locks()
    groups = family.parameter_groups(model, config.optim)
    check_groups(model, groups)
    buffers = float_buffers(model)
    ds, _, _, _ = deepspeed.initialize(model=model, optimizer=_optimizer(config, groups, world), config=ds_config,
                                       dist_init_required=False)
    restore_buffers(model, buffers)
    if config.engine.compile:
        ds.compile()
    return Engine(ds, model, config.engine.zero_stage, precision, ds_config, [g.lr_scale for g in groups],
                  config.optim.grad_clip, world, keepalive)


def build_model(config: RunConfig, family: Family, batch: ResolvedBatch, precision: Precision,
                world: World) -> tuple[PreTrainedModel, dict[str, Any], Any]:
    """Build the run's model in fp32 and its DeepSpeed dict; the third member must be kept alive with the engine.

    Under ZeRO-3 large models are partitioned while they are built. That goes through transformers' own way in: with
    `deepspeed.zero.Init` around a model, its weight initialisation runs on empty tensors and is lost.
    """
    ds_config = deepspeed_config(config, batch, precision, on_cuda=world.device.type == "cuda")
    keepalive = None
    if built_in_parts(config):
        from transformers.integrations import HfDeepSpeedConfig
        keepalive = HfDeepSpeedConfig(ds_config)
    context = BuildContext(dtype=torch.float32, device=world.device, seed=config.seed,
                           activation_checkpointing=config.engine.activation_checkpointing,
                           document_masking=config.data.document_masking)
    with freed_memory_returned() if keepalive is not None else nullcontext():
        model = family.build(config.model, context)
    model.train()
    return model, ds_config, keepalive


def check_groups(model: PreTrainedModel, groups: list[ParamGroup]) -> None:
    """Every trainable parameter stands in exactly one group."""
    seen: dict[int, str] = {}
    for group in groups:
        for parameter in group.params:
            if id(parameter) in seen:
                raise RuntimeError(f"a parameter stands in groups {seen[id(parameter)]} and {group.name}")
            seen[id(parameter)] = group.name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            raise RuntimeError(f"trainable parameter {name} stands in no group")


def _optimizer(config: RunConfig, groups: list[ParamGroup], world: World) -> torch.optim.Optimizer:
    optim = config.optim
    dicts = [{"params": g.params, "weight_decay": g.weight_decay, "lr": optim.lr * g.lr_scale,
              "betas": g.betas or optim.betas} for g in groups]
    if config.engine.offload.optimizer == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        return DeepSpeedCPUAdam(dicts, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(dicts, lr=optim.lr, betas=optim.betas, eps=optim.eps,
                             fused=world.device.type == "cuda")
