"""A small family that uses every part of the contract: frozen weights, buffers, scalars, hooks, both objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.config import registry
from pretrain.config.model import ModelConfig, ParameterCount
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.run import OptimConfig, RunConfig
from pretrain.config.source import SourceConfig
from pretrain.data.batch import Batch
from pretrain.models.base import BuildContext, EncoderOutput, Family, Hooks, LMOutput, ParamGroup, StepContext
from pretrain.objectives.base import UpdateHandle, UpdateResult


class ToyConfig(ModelConfig):
    family: Literal["toy"] = "toy"
    width: int = 16
    vocab_size_: int = Field(64, alias="vocab_size")
    dropout: float = 0.0
    encoder: bool = False
    hooked: bool = False

    @property
    def kind(self) -> Literal["causal_lm", "encoder"]:
        return "encoder" if self.encoder else "causal_lm"

    @property
    def vocab_size(self) -> int:
        return self.vocab_size_

    @property
    def max_seq_len(self) -> int | None:
        return None

    def parameter_count(self) -> ParameterCount:
        d, v = self.width, self.vocab_size
        frozen = d * d + d
        trainable = v * d + (d * d + d) + 1 + (0 if self.encoder else d * v)
        return ParameterCount(total=trainable + frozen, trainable=trainable)

    def flops_per_token(self, seq_len: int) -> float:
        return 2.0 * (2 * self.width**2 + self.width * self.vocab_size)

    def activation_bytes_per_token(self, seq_len: int, *, element_bytes: int, checkpointing: bool,
                                   scored: int | None = None) -> float:
        return 8.0 * self.width * element_bytes

    def tiny(self) -> ToyConfig:
        return self


class ToyHFConfig(PreTrainedConfig):
    model_type = "toy-test"

    def __init__(self, width: int = 16, vocab_size: int = 64, dropout: float = 0.0, encoder: bool = False,
                 **kw: Any) -> None:
        super().__init__(**kw)
        self.width, self.vocab_size, self.dropout, self.encoder = width, vocab_size, dropout, encoder


class ToyModel(PreTrainedModel):
    """Causal mean over the tokens of a document, a frozen and a trained layer, an fp32 frequency buffer, a gate."""

    config_class = ToyHFConfig

    def __init__(self, config: ToyHFConfig) -> None:
        super().__init__(config)
        d = config.width
        self.embed = torch.nn.Embedding(config.vocab_size, d)
        self.frozen = torch.nn.Linear(d, d)
        self.trained = torch.nn.Linear(d, d)
        self.gate = torch.nn.Parameter(torch.ones(1))
        self.head = None if config.encoder else torch.nn.Linear(d, config.vocab_size, bias=False)
        self.register_buffer("frequency", 1.0 + torch.arange(d, dtype=torch.float32) / 3000.0)
        self.frozen.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None,
                document_ids: torch.Tensor | None = None, controls: Mapping[str, float] | None = None,
                return_logits: bool = False) -> Any:
        x = self.embed(input_ids)
        ramp = (controls or {}).get("ramp", 1.0)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        mixed = x.float().cumsum(1) / count * self.frequency
        h = x + torch.tanh(self.frozen(mixed.to(x.dtype))) * self.gate * ramp
        h = h + F.dropout(torch.tanh(self.trained(h)), self.config.dropout, self.training)
        if self.head is None:
            return EncoderOutput(heads={"mean": F.normalize(h.float().mean(1), dim=-1)}, default="mean", aux={})
        logits = self.head(h)
        nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        valid = labels != -100
        return LMOutput(nll_sum=nll, n_tokens=valid.sum(), n_correct=((logits.argmax(-1) == labels) & valid).sum(),
                        logits=logits if return_logits else None)


class ToyHooks(Hooks):
    """A ramp over the first ten steps, and a gate nudged after each step."""

    def __init__(self) -> None:
        self.trail = torch.zeros(3)
        self.calls = 0

    def controls(self, step: int) -> dict[str, float]:
        return {"ramp": min(1.0, (step + 1) / 10)}

    def after_step(self, ctx: StepContext) -> None:
        self.calls += 1
        ctx.write("gate", ctx.read("gate") * 0.999)
        self.trail = self.trail + float(ctx.read("gate"))

    def state_dict(self) -> dict[str, Any]:
        return {"trail": self.trail, "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.trail, self.calls = state["trail"], state["calls"]


def build(cfg: ToyConfig, ctx: BuildContext) -> ToyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        return ToyModel._from_config(ToyHFConfig(cfg.width, cfg.vocab_size, cfg.dropout, cfg.encoder)).to(ctx.device)


def groups(model: PreTrainedModel, optim: OptimConfig) -> list[ParamGroup]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if n.endswith("weight") and "embed" not in n]
    rest = [p for n, p in named if not (n.endswith("weight") and "embed" not in n)]
    return [ParamGroup("matrices", matrices, 1.0, optim.weight_decay), ParamGroup("rest", rest, 0.5, 0.0)]


def hooks(config: RunConfig) -> Hooks:
    return ToyHooks() if config.model.hooked else Hooks()  # type: ignore[attr-defined]


FAMILY = Family("toy", ToyConfig, build, groups, frozenset({"causal_lm", "toy_contrastive"}), hooks)


class ToyContrastiveConfig(ObjectiveConfig):
    protocol = "update"
    name: Literal["toy_contrastive"] = "toy_contrastive"
    temperature: float = 0.1


class ToyContrastive:
    """Symmetric InfoNCE between the two halves of each window, negatives gathered over ranks, gradients cached."""

    def __init__(self, config: ToyContrastiveConfig) -> None:
        self.temperature = config.temperature

    def probe_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"input_ids": batch["input_ids"]}

    def run(self, handle: UpdateHandle, micro_batches: Any, controls: Mapping[str, float]) -> UpdateResult:
        views = [Batch(b.sample_ids, {"input_ids": half}) for b in micro_batches
                 for half in b["input_ids"].chunk(2, dim=1)]
        states, vectors = [], []
        for view in views:
            states.append(handle.rng_state())
            vectors.append(handle.forward(view, grad=False).heads["mean"])
        a, p = torch.cat(vectors[0::2]), torch.cat(vectors[1::2])
        local = torch.stack([a, p]).requires_grad_()
        all_a, all_p = handle.all_gather(a), handle.all_gather(p)
        rows = slice(handle.rank * len(a), (handle.rank + 1) * len(a))
        all_a = torch.cat([all_a[:rows.start], local[0], all_a[rows.stop:]])
        all_p = torch.cat([all_p[:rows.start], local[1], all_p[rows.stop:]])
        scores = all_a @ all_p.T / self.temperature
        target = torch.arange(len(scores), device=scores.device)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        if not handle.agree(bool(torch.isfinite(loss))):
            return UpdateResult(float(loss), {}, False)
        (gradient,) = torch.autograd.grad(loss, local)
        gradient = gradient * handle.world  # the engine averages over ranks
        size = [len(v) for v in vectors[0::2]]
        parts = [g for pair in zip(gradient[0].split(size), gradient[1].split(size), strict=True) for g in pair]
        for i, (view, state, part) in enumerate(zip(views, states, parts, strict=True)):
            out = handle.forward(view, grad=True, rng=state).heads["mean"]
            handle.backward((out * part).sum(), last=i == len(views) - 1)
        return UpdateResult(float(loss), {"accuracy": float((scores.argmax(1) == target).float().mean())}, True)


class UnevenConfig(SourceConfig):
    kind: Literal["uneven"] = "uneven"
    samples: int = 512


class UnevenSource:
    """Windows of 16 tokens whose first 0 to 15 labels are ignored: every sample weighs differently."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.fingerprint = f"uneven-{samples}"

    def __len__(self) -> int:
        return self.samples

    def get(self, sample_ids: np.ndarray) -> Batch:
        rows = [np.random.default_rng([7, int(i)]).integers(0, 64, 17) for i in sample_ids]
        tokens = torch.from_numpy(np.stack(rows))
        labels = tokens[:, 1:].clone()
        ignored = torch.tensor([int(np.random.default_rng([8, int(i)]).integers(0, 16)) for i in sample_ids])
        labels[torch.arange(16)[None] < ignored[:, None]] = -100
        ids = torch.from_numpy(sample_ids.astype(np.int64))
        return Batch(ids, {"input_ids": tokens[:, :-1].clone(), "labels": labels})


def open_uneven(config: UnevenConfig, data: Any) -> UnevenSource:
    return UnevenSource(config.samples)


def register() -> None:
    """Make the toy family and objective known to this process."""
    registry.MODEL_SCHEMAS["toy"] = "tests.engine.toy:ToyConfig"
    registry.FAMILIES["toy"] = "tests.engine.toy:FAMILY"
    registry.OBJECTIVE_SCHEMAS["toy_contrastive"] = "tests.engine.toy:ToyContrastiveConfig"
    registry.SOURCE_SCHEMAS["uneven"] = "tests.engine.toy:UnevenConfig"
    registry.SOURCES["uneven"] = "tests.engine.toy:open_uneven"
    registry.OBJECTIVES["toy_contrastive"] = "tests.engine.toy:ToyContrastive"
