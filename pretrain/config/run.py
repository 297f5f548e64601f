"""`RunConfig`: one typed description of a whole run. Every command takes the same file; nothing is configured twice.

Sections stand in the order in which a run meets them. Each field has a range and one line of help, which is also what
`pretrain config schema` prints for editors.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.interval import Interval, Progress
from pretrain.config.model import ModelConfig, Section
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.registry import MODEL_SCHEMAS, OBJECTIVE_SCHEMAS, resolve
from pretrain.config.slurm import SlurmConfig
from pretrain.config.source import DataConfig
from pretrain.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]


class BatchConfig(Section):
    """global_batch_size = micro_batch_size x gradient_accumulation_steps x data_parallel_size; one may be left out."""

    global_batch_size: int | None = Field(None, ge=1, description="samples an update, over all ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="samples a rank holds at once")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="micro-batches an update and rank")

    def resolve(self, data_parallel_size: int) -> ResolvedBatch:
        """Fill in the missing member. Raises ConfigError that names a cure."""
        from pretrain.config.batch import resolve_batch
        return resolve_batch(self, data_parallel_size)


class ResolvedBatch(Section):
    """A batch equation that holds."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int

    def progress(self, updates: int, tokens_per_sample: int, epoch_samples: int | None = None) -> Progress:
        """Progress after so many updates, each of them a step."""
        samples = updates * self.global_batch_size
        return Progress(steps=updates, micro_steps=updates * self.gradient_accumulation_steps, samples=samples,
                        tokens=samples * tokens_per_sample, epoch_samples=epoch_samples)


class OptimConfig(Section):
    """AdamW. Decay is applied to matrices only: no biases, norms or embeddings, as the family's groups say."""

    lr: float = Field(3e-4, gt=0, le=10, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the first and second moment")
    eps: float = Field(1e-8, gt=0, le=1e-2, description="added to the denominator")
    weight_decay: float = Field(0.1, ge=0, le=1, description="decoupled decay of the decayed groups")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 switches clipping off")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError(f"{value} must both lie in [0, 1)")
        return value


class ScheduleConfig(Section):
    """Learning rate over updates, as a factor of `optim.lr`."""

    name: Literal["cosine", "linear", "constant", "wsd", "plateau"] = "cosine"
    warmup: Interval | None = Field(Interval(500, "steps"), description="linear rise from 0; null: none")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    decay: Interval | None = Field(None, description="wsd only: length of the final decay; null: a tenth of the run")
    plateau_patience: int = Field(3, ge=1, description="plateau only: evaluations without improvement before a cut")
    plateau_factor: float = Field(0.5, gt=0, lt=1, description="plateau only: factor of a cut")


class TrainConfig(Section):
    """How long to train and when to stop."""

    length: Interval = Field(Interval(1000, "steps"), description="length of the run")
    max_hours: float | None = Field(None, gt=0, description="stop with a checkpoint and exit 85 after this wall time")
    max_bad_steps: int = Field(10, ge=1, description="non-finite updates in a row before exit 4")
    max_bad_per_1000: int | None = Field(None, ge=1, le=1000, description="those among the last 1000 before exit 4")
    on_spike: Literal["warn", "skip", "rewind"] = Field(
        "warn", description="loss far above its running median: say so, drop the update, or go back to the checkpoint "
        "before it and on after it")
    max_rewinds: int = Field(3, ge=1, description="returns to one and the same step before exit 4")
    init_from: str | None = Field(None, description="run, checkpoint or export to take weights from, and of the model "
                                  "what this config leaves open; nothing else")
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on from the newest checkpoint of the run")
    target_perplexity: float | None = Field(None, gt=1, description="stop once validation perplexity is at or below")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without improvement")
    patience_delta: float = Field(0.0, ge=0, description="improvement by no more than this is none to patience; the "
                                  "best checkpoint is the best all the same")
    patience_after: Interval | None = Field(None, description="evaluations before this do not count; null: all do")
    gates_at_start: bool = Field(False, description="run the model gates before the first step; exit 5 if one fails")


class OffloadConfig(Section):
    """What leaves the accelerator between uses."""

    optimizer: Literal["none", "cpu"] = "none"
    parameters: Literal["none", "cpu"] = "none"


class EngineConfig(Section):
    """DeepSpeed and precision."""

    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="what is partitioned: 1 optimizer, 2 gradients, 3 weights")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: see `pretrain doctor`")
    offload: OffloadConfig = Field(default_factory=OffloadConfig)
    activation_checkpointing: bool = Field(False, description="recompute block activations in the backward pass")
    zero3_init: Literal["auto", "on", "off"] = Field("auto", description="partition weights while building (stage 3)")
    compile: bool = Field(False, description="torch.compile the model")
    deterministic: bool = Field(False, description="ask torch for deterministic kernels (slower on CUDA)")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="further DeepSpeed keys; no contradictions")


class MirrorConfig(Section):
    """A second copy of checkpoints, on another disk; made in the background, never in the way of training."""

    path: str | None = Field(description="folder; the copy of the run is PATH/NAME. null: no copies")
    every: int = Field(1, ge=1, description="1: copy every save; more: every so many of those that checkpoint.every is "
                       "the reason of")


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: Interval | None = Field(Interval(500, "steps"), description="null: only at the end and on request")
    keep_last: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(1, ge=0, description="checkpoints kept for being best on validation")
    keep_every: Interval | None = Field(None, description="checkpoints at multiples of this are kept for good")
    async_save: bool = Field(False, description="write in the background: training waits for one copy of its state to "
                             "host memory, which must have room for it")
    mirror: MirrorConfig | None = Field(None, description="copy of checkpoints to a second folder; null: none")


class EmbeddingEvalConfig(Section):
    """What encoders are evaluated on while they train, beside the validation split of their pairs."""

    sts: str | None = Field(None, description="file of sentence1, sentence2, score for val/sts_spearman: a dev split, "
                            "never the test split")
    quick_pairs: int = Field(200, ge=2, description="pairs of val/sts_quick, a fixed subset; it selects nothing")
    target_sts: float | None = Field(None, gt=0, le=1, description="what the log line shows progress towards")
    head: str | None = Field(None, description="head of val/ndcg@10 and val/recall@10; null: the default one")
    queries: int = Field(1000, ge=1, description="most queries of retrieval, spread evenly over the split")
    pool: int = Field(2000, ge=2, description="passages searched: those of the split, filled up from train")
    collapse_texts: int = Field(512, ge=2, description="passages, spread likewise, whose effective rank and mean "
                                "cosine are told")
    loss_triplets: int | None = Field(2000, ge=32, description="triplets of val/loss; null: the whole split")
    health_after: Interval = Field(Interval(5000, "micro_steps"), description="warn of collapse from here on")
    collapse_warn: float = Field(0.8, gt=-1, le=1, description="val/mean_cosine above which vectors have collapsed")
    rank_warn: float = Field(64.0, ge=1, description="val/effective_rank below which they have")


class EvalConfig(Section):
    """Validation during training. Selection is on validation; test is only ever reported."""

    every: Interval | None = Field(Interval(500, "steps"), description="null: only at the end")
    at_start: bool = Field(False, description="also before the first step: what training begins with")
    max_batches: int | None = Field(None, ge=1, description="global batches an evaluation; null: the whole split")
    metric: str = Field("val/loss", description="metric that selects the best checkpoint")
    samples: int = Field(0, ge=0, le=64, description="texts generated at each evaluation (causal LMs)")
    embedding: EmbeddingEvalConfig = Field(default_factory=EmbeddingEvalConfig)


class MonitorConfig(Section):
    """What is written about the run."""

    log_every: Interval = Field(Interval(10, "steps"), description="rows of metrics and lines of log")
    tensorboard: bool = True
    wandb: bool = Field(False, description="needs the extra [wandb]")
    wandb_project: str = "pretrain"
    progress: Literal["auto", "bar", "lines", "off"] = Field("auto", description="auto: bar on a terminal, else lines")
    profile_steps: tuple[int, int] | None = Field(None, description="first and last step of a torch profiler trace")
    peak_flops: float | None = Field(None, gt=0, description="peak FLOP/s of one device, where it is not known to us")


class LaunchConfig(Section):
    """Processes of a local run. Under srun and torchrun the environment decides instead."""

    nproc: int = Field(1, ge=1, le=1024, description="processes on this machine")
    port: int | None = Field(None, ge=1, le=65535, description="rendezvous port; null: a free one")
    timeout: float = Field(300.0, gt=0, description="seconds for all ranks to come together")
    preflight: float = Field(120.0, gt=0, description="seconds for the first all-reduce, before a model is built")
    hang_timeout: float | None = Field(1800.0, gt=0, description="seconds without progress of a rank before exit 6; "
                                       "null: no watch, and collectives end after launch.timeout")
    threads: int | None = Field(None, ge=1, description="CPU threads a process; null: cores / nproc")


class RunConfig(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$", description="folder name under runs_dir")
    runs_dir: str = Field("runs", description="folder of run folders")
    seed: int = Field(42, ge=0, lt=2**63, description="seeds weights, data order and dropout; sources and "
                      "objectives that draw have a seed of their own")
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    slurm: SlurmConfig | None = Field(None, description="job on a cluster, for `pretrain slurm`; null: none")

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "family" not in value:
            raise ConfigError("model.family", "is missing; known: " + ", ".join(sorted(MODEL_SCHEMAS)))
        return resolve(MODEL_SCHEMAS, str(value["family"]), "model.family").model_validate(value)

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            raise ConfigError("objective.name", "is missing; known: " + ", ".join(sorted(OBJECTIVE_SCHEMAS)))
        return resolve(OBJECTIVE_SCHEMAS, str(value["name"]), "objective.name").model_validate(value)

    @model_validator(mode="after")
    def _across(self) -> RunConfig:
        from pretrain.config.checks import check_run
        check_run(self)
        return self
