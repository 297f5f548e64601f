"""How long a step takes on a cluster, term by term, and what the run costs.

With P trainable and F frozen parameters, e bytes a weight, W ranks, a accumulation steps and R = (W - 1) / W:

    compute         FLOPs of a step / (W x peak x efficiency), and a third of them again for each further forward:
                    activation checkpointing, gradient caching
    gradients       stage 0, 1: 2 R 4 P       stage 2: a x 2 R 4 P       stage 3: a x R 4 P        bytes a rank sends
    weights         stage 0: none             stage 1, 2: R e P          stage 3: a x R e (P + F), twice what exceeds
                                                                         the weights that stay gathered
    optimizer       (40 + e) bytes a parameter of this rank, through its memory
    saves           bytes of a checkpoint / disk / steps between saves; none in the background

DeepSpeed 0.19.8 reduces the gradients of stages 1 and 2 by all-reduce (a ring sends everything twice), those of stage 3
by reduce-scatter; always in fp32 here. Bytes are held to counted collectives (`tests/engine/test_traffic.py`), compute,
optimizer and saves to measurements (`benchmarks/cost.py`). How much of the communication hides behind computing is not
modelled: a step takes at least the longer of the two, at most their sum, and the sum is what the cost is made of.
Loading data, evaluations and waiting in the queue are not counted, nor is offload. Objectives that drive their own
passes (contrastive) make several a sample, of which one of `seq_len` tokens is counted: their figures are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config.memory import MAX_LIVE_PARAMETERS
from pretrain.config.plan import Plan
from pretrain.config.run import RunConfig
from pretrain.errors import UserError

_OPTIMIZER_BYTES = 40
"""Bytes of memory traffic a parameter: norm and clipping of the fp32 gradient 12, AdamW reads 16 and writes 12."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device and what connects it; every figure in units a second."""

    peak_flops: float
    efficiency: float
    """Share of the peak that kernels reach while nothing is communicated, in (0, 1]."""
    link: float
    """Bytes that a rank sends over the slowest link between ranks."""
    memory: float
    """Bytes that a device reads or writes in its own memory."""
    disk: float
    """Bytes that all ranks together write to the disk of the run folder."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends in a step."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True, slots=True)
class TimeTerm:
    """One part of a step."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step, with every term of it."""

    compute: TimeTerm
    communication: tuple[TimeTerm, ...]
    others: tuple[TimeTerm, ...]

    @property
    def terms(self) -> tuple[TimeTerm, ...]:
        """All of them."""
        return (self.compute, *self.communication, *self.others)

    @property
    def most(self) -> float:
        """Seconds where nothing is hidden behind computing."""
        return sum(term.seconds for term in self.terms)

    @property
    def least(self) -> float:
        """Seconds where communication is hidden as far as possible."""
        sent = sum(term.seconds for term in self.communication)
        return max(self.compute.seconds, sent) + sum(term.seconds for term in self.others)


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run takes."""

    hours: float
    device_hours: float
    cost: float | None


def traffic(config: RunConfig, plan: Plan) -> tuple[Traffic, ...]:
    """Bytes that one rank sends in a step, by ring algorithms; nothing on one rank."""
    stage, world = config.engine.zero_stage, plan.world_size
    ring = (world - 1) / world
    element = 4 if plan.precision == "fp32" else 2
    trained, total = plan.parameters.trainable, plan.parameters.total
    accumulation = plan.batch.gradient_accumulation_steps
    times = accumulation if stage >= 2 else 1
    many = f"{times} x " if times > 1 else ""
    if stage == 3:
        gathered = total + max(0, total - MAX_LIVE_PARAMETERS)
        found = [Traffic("gradients", times * ring * 4 * trained, f"{many}R 4 P"),
                 Traffic("weights", times * ring * element * gathered, f"{many}R {element} (P + F)"
                         + (" and again what exceeds 1e9 of them" if gathered > total else ""))]
    else:
        found = [Traffic("gradients", times * 2 * ring * 4 * trained, f"{many}2 R 4 P")]
        if stage:
            found.append(Traffic("weights", ring * element * trained, f"R {element} P"))
    return tuple(sent for sent in found if sent.bytes)


def step_time(config: RunConfig, plan: Plan, hardware: Hardware) -> StepTime:
    """The terms of one step. Raises UserError for offload, of which nothing is known."""
    if config.engine.offload.optimizer != "none" or config.engine.offload.parameters != "none":
        raise UserError("engine.offload: how long a step takes with it is not modelled; measure it and give "
                        "--tokens-per-second")
    again = config.engine.activation_checkpointing + bool(getattr(config.objective, "grad_cache", False))
    flops = plan.flops_per_token * plan.tokens_per_step
    done = plan.world_size * hardware.peak_flops * hardware.efficiency
    compute = TimeTerm("compute", (3 + again) / 3 * flops / done,
                       f"{f'{3 + again}/3 x ' if again else ''}{flops:.3g} FLOPs / "
                       f"(W x {hardware.peak_flops / 1e12:.4g} TFLOP/s x {hardware.efficiency:g})"
                       + ("; one pass a sample: a lower bound" if config.objective.protocol == "update" else ""))
    sent = tuple(TimeTerm(f"{part.name} sent", part.bytes / hardware.link,
                          f"{part.formula} bytes / {hardware.link / 1e9:g} GB/s") for part in traffic(config, plan))
    return StepTime(compute, sent, tuple(_others(config, plan, hardware)))


def _others(config: RunConfig, plan: Plan, hardware: Hardware) -> Iterator[TimeTerm]:
    element = 4 if plan.precision == "fp32" else 2
    share = plan.parameters.trainable / (plan.world_size if config.engine.zero_stage else 1)
    each = _OPTIMIZER_BYTES + element
    yield TimeTerm("optimizer", each * share / hardware.memory,
                   f"{each} bytes x P{' / W' if config.engine.zero_stage else ''} / {hardware.memory / 1e9:,.0f} GB/s")
    every = config.checkpoint.every
    if every is None or config.checkpoint.async_save or (every.unit == "epochs" and not plan.epoch_samples):
        return
    steps = every.to_steps(micro_steps_per_step=plan.batch.gradient_accumulation_steps,
                           samples_per_step=plan.batch.global_batch_size, tokens_per_step=plan.tokens_per_step,
                           epoch_samples=plan.epoch_samples)
    yield TimeTerm("saves", plan.checkpoint_bytes / hardware.disk / steps,
                   f"{plan.checkpoint_bytes / 1e9:.3g} GB / {hardware.disk / 1e9:g} GB/s / {steps:,} steps")


def bill(steps: int, seconds_a_step: float, world_size: int, price: float | None) -> Bill:
    """Hours, device hours, and what they cost at `price` a device hour."""
    hours = steps * seconds_a_step / 3600
    return Bill(hours, hours * world_size, None if price is None else hours * world_size * price)
