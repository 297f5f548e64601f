"""Memory of one rank, term by term, as DeepSpeed 0.19.8 allocates it.

With P trainable and F frozen parameters, W ranks, e bytes a weight (4 in fp32, 2 in bf16 and fp16) and B elements a
reduce bucket, a rank holds

    weights          stage 0-2: e (P + F)    stage 3: e (P + F) / W, gathered whole while in use
    master weights   stage 0: none           stage 1-3: 4 P / W    (a copy, in fp32 too)
    Adam moments     stage 0: 8 P            stage 1-3: 8 P / W
    gradients        stage 0-1: 4 P          stage 2-3: 4 P / W    (always accumulated in fp32)

and beside them what comes and goes. *build*: the model in fp32 and its copy in partitions. *backward*: activations,
logits, reduce buckets. *step*: a flat copy of the gradients and two temporaries of torch's AdamW (none when fused or on
the host). The peak is the largest of the three. On a CPU the C library keeps freed activations and gathered weights for
reuse, so they count in the step as well; the constants for that are fitted to measurements
(`benchmarks/estimate.py`). The processes' own libraries (about 0.6 GB a rank) and the CUDA context are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.config.deepspeed import bucket_elements, built_in_parts
from pretrain.config.precision import DeviceKind
from pretrain.config.run import Precision, ResolvedBatch, RunConfig

PhaseName = Literal["build", "backward", "step"]
LIBRARIES_BYTES = 600 * 2**20
"""Memory of a process that has imported everything, before it holds a model."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Gathered weights that stage 3 keeps at once (`stage3_max_live_parameters`): below it, all of them."""
_KEPT_ACTIVATIONS = 0.4
"""Bytes that a CPU process holds beside each byte of activations: the C library does not return all that is freed."""
_KEPT_A_PARAMETER = 0.7
"""Further bytes a trainable parameter that it holds on a CPU."""
_KEPT_ANYWAY = 64 * 2**20
"""Bytes that it holds whatever the model: buffers of gloo and of the matrix products."""


@dataclass(frozen=True, slots=True)
class Term:
    """One thing that takes memory."""

    name: str
    bytes: int
    formula: str
    host: bool = False
    """Kept in main memory by offload; on a CPU all is main memory."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Terms of each phase of one rank."""

    phases: dict[PhaseName, tuple[Term, ...]]
    bucket_elements: int
    """B of the formulas."""

    @property
    def peak(self) -> PhaseName:
        """The phase that takes most of the device."""
        return max(self.phases, key=self._device)

    @property
    def device_bytes(self) -> int:
        """Peak on the device that trains."""
        return self._device(self.peak)

    @property
    def host_bytes(self) -> int:
        """Peak of what offload keeps in main memory."""
        return max(sum(term.bytes for term in terms if term.host) for terms in self.phases.values())

    def _device(self, phase: PhaseName) -> int:
        return sum(term.bytes for term in self.phases[phase] if not term.host)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Symbols of the formulas above."""

    trainable: int
    frozen: int
    world: int
    element: int
    stage: int
    bucket: int
    activations: int
    logits: int
    accumulates: bool
    cpu: bool
    optimizer_on_host: bool
    weights_on_host: bool
    built_in_parts: bool

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def share(self) -> int:
        """Trainable parameters whose optimizer state this rank holds."""
        return -(-self.trainable // self.world) if self.stage else self.trainable

    @property
    def gathered(self) -> int:
        """Bytes of whole weights that stage 3 keeps while they are in use."""
        return self.element * min(self.total, MAX_LIVE_PARAMETERS) if self.stage == 3 else 0


def rank_memory(config: RunConfig, batch: ResolvedBatch, precision: Precision, device: DeviceKind) -> RankMemory:
    """Memory of one rank of `config` in each phase."""
    model, engine, count = config.model, config.engine, config.model.parameter_count()
    element = 4 if precision == "fp32" else 2
    tokens = config.objective.kept_tokens(config.data, batch)
    scored = config.objective.scored_tokens(config.data)
    per_token = model.activation_bytes_per_token(config.data.seq_len, element_bytes=element, scored=scored,
                                                 checkpointing=engine.activation_checkpointing)
    stage, cpu = engine.zero_stage, device == "cpu"
    bucket = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size") or bucket_elements(config)
    sizes = _Sizes(
        trainable=count.trainable, frozen=count.total - count.trainable, world=batch.data_parallel_size,
        element=element, stage=stage, bucket=int(bucket), activations=int(per_token * tokens),
        logits=model.loss_bytes(batch.micro_batch_size * scored, element_bytes=element),
        accumulates=batch.gradient_accumulation_steps > 1,
        cpu=cpu, optimizer_on_host=engine.offload.optimizer == "cpu" and not cpu,
        weights_on_host=engine.offload.parameters == "cpu" and not cpu,
        built_in_parts=built_in_parts(config))
    fused = device == "cuda" or engine.offload.optimizer == "cpu"
    return RankMemory({"build": tuple(_build(sizes)),
                       "backward": tuple([*_held(sizes), *_backward(sizes)]),
                       "step": tuple([*_held(sizes), *_step(sizes, fused)])}, sizes.bucket)


def _build(s: _Sizes) -> Iterator[Term]:
    parts, by = (s.world, " / W") if s.built_in_parts else (1, "")
    yield Term("weights as built", 4 * s.total // parts, f"4 (P + F){by}")
    if s.stage == 3:
        yield Term("partitions", 2 * s.element * s.total // s.world, f"2 x {s.element} (P + F) / W")
    elif s.stage:
        yield Term("flat copy of weights", s.element * s.total, f"{s.element} (P + F)")
    yield from _slack(s, 0)


def _held(s: _Sizes) -> Iterator[Term]:
    """What stays from the first step on."""
    if s.stage == 3:
        yield Term("weights", s.element * s.total // s.world, f"{s.element} (P + F) / W", s.weights_on_host)
    else:
        yield Term("weights", s.element * s.total, f"{s.element} (P + F)")
    by = " / W" if s.stage else ""
    if s.stage:
        yield Term("master weights", 4 * s.share, "4 P / W", s.optimizer_on_host)
    yield Term("Adam moments", 8 * s.share, f"8 P{by}", s.optimizer_on_host)
    if s.stage >= 2:
        yield Term("gradients", 4 * s.share, "4 P / W", s.optimizer_on_host)
    else:
        yield Term("gradients", 4 * s.trainable, "4 P")
    if s.stage == 3:
        yield Term("reduce bucket", 4 * s.bucket, "4 B")


def _backward(s: _Sizes) -> Iterator[Term]:
    if s.gathered:
        yield Term("gathered weights", s.gathered, f"{s.element} (P + F), at most {MAX_LIVE_PARAMETERS:,} weights")
    yield Term("activations", s.activations, "family's estimate x tokens kept at once")
    yield Term("logits and their gradient", s.logits, "2 x tokens with a loss x vocabulary, chunk by chunk")
    if s.stage == 0:
        yield Term("communication copy", 4 * s.trainable if s.world > 1 else 0, "4 P")
    elif s.stage == 3:
        yield Term("communication copy", 4 * s.bucket, "4 B")
    else:
        # Communication overlaps on accelerators, with two buckets in turn. The copy that is sent comes once a bucket
        # is full, when as much or more of the activations is gone.
        buffers = 1 if s.cpu else 2
        yield Term("reduce buckets", 4 * s.bucket * buffers, f"{buffers} x 4 B")
    if s.stage == 2 and s.accumulates and s.element == 4:
        yield Term("gradients of the micro-batch", 4 * s.share, "4 P / W")
    yield from _slack(s, round(_KEPT_ACTIVATIONS * s.activations), "0.4 x activations + ")


def _step(s: _Sizes, fused: bool) -> Iterator[Term]:
    if s.stage == 3 or (s.stage and s.element == 4):
        yield Term("flat gradients", 4 * s.share, "4 P / W", s.optimizer_on_host)
    if not fused and s.stage:
        yield Term("AdamW temporaries", 8 * s.share, "2 x 4 P / W")
    kept = round((1 + _KEPT_ACTIVATIONS) * s.activations) + s.gathered if s.cpu else 0
    yield from _slack(s, kept, "1.4 x activations + gathered weights + ")


def _slack(s: _Sizes, kept: int, formula: str = "") -> Iterator[Term]:
    """Memory that the C library holds on a CPU after it was freed."""
    if s.cpu:
        held = kept + round(_KEPT_A_PARAMETER * s.trainable) + _KEPT_ANYWAY
        yield Term("kept by the allocator", held, f"{formula}0.7 P + 64 MiB")


def gib(count: int) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
