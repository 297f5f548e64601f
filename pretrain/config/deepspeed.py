"""RunConfig -> the DeepSpeed dict. Every field that the engine depends on is written explicitly, defaults included.

The same JSON files in `configs/deepspeed/` work with plain DeepSpeed; here they are the starting point, and the run's
batch, precision, clipping and offload are laid over them. Measured reasons stand beside the values.
"""

from __future__ import annotations

import json
from typing import Any

from pretrain.config.presets import configs_dir
from pretrain.config.run import Precision, ResolvedBatch, RunConfig
from pretrain.errors import UserError

MAX_BUCKET_ELEMENTS = 50_000_000
"""Elements of DeepSpeed's reduce bucket. It is allocated whole, so a small model gets a bucket of its own size."""
ZERO3_INIT_PARAMETERS = 500_000_000
"""`engine.zero3_init: auto` partitions weights as they are built from this size on. Below it the model is built whole
and then partitioned, so that all stages start from the same bits."""



def deepspeed_config(config: RunConfig, batch: ResolvedBatch, precision: Precision, *, on_cuda: bool) -> dict[str, Any]:
    """The complete DeepSpeed dict of a run.

    For update objectives DeepSpeed sees one micro-batch an update (gradients must not be divided by their number); for
    sum objectives it sees the real accumulation. `engine.deepspeed` is laid over it; see `deepspeed_keys`.
    """
    stage = config.engine.zero_stage
    ds = _base(stage)
    accumulation = batch.gradient_accumulation_steps if config.objective.protocol == "sum" else 1
    ds["train_batch_size"] = batch.global_batch_size
    ds["gradient_accumulation_steps"] = accumulation
    ds["train_micro_batch_size_per_gpu"] = batch.global_batch_size // (accumulation * batch.data_parallel_size)
    # Stage 0 applies non-finite gradients without a word: there the engine clips and checks by itself.
    ds["gradient_clipping"] = config.optim.grad_clip if stage else 0.0
    ds["bf16"] = {"enabled": precision == "bf16"}
    ds["fp16"] = {"enabled": precision == "fp16"}
    if precision == "bf16":
        ds["bf16"]["check_grad_overflow"] = True
    if precision == "fp16":
        ds["fp16"].update(initial_scale_power=16, loss_scale_window=1000, hysteresis=2, min_loss_scale=1)
    if precision != "fp32":
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
        ds["communication_data_type"] = "fp32"
    zero = ds["zero_optimization"]
    if stage:
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = bucket_elements(config)
        zero["overlap_comm"] = on_cuda
        pin = on_cuda
        if config.engine.offload.optimizer == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if config.engine.offload.parameters == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    _lay_over(ds, config.engine.deepspeed)
    return ds


def bucket_elements(config: RunConfig) -> int:
    """Elements of the reduce bucket, before `engine.deepspeed` has its say. Even: DeepSpeed refuses an odd number."""
    trainable = config.model.parameter_count().trainable
    return min(MAX_BUCKET_ELEMENTS, max(1_000_000, trainable + trainable % 2))


def built_in_parts(config: RunConfig) -> bool:
    """Whether weights are partitioned while the model is built (ZeRO stage 3 only)."""
    wanted = config.engine.zero3_init
    large = config.model.parameter_count().total >= ZERO3_INIT_PARAMETERS
    return config.engine.zero_stage == 3 and (wanted == "on" or (wanted == "auto" and large))


def _base(stage: int) -> dict[str, Any]:
    path = configs_dir() / "deepspeed" / f"zero{stage}.json"
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as DeepSpeed JSON: {error}") from None
    for key in ("bf16", "fp16", "optimizer", "scheduler", "gradient_clipping", "train_batch_size",
                "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        loaded.pop(key, None)
    return loaded


def _lay_over(ds: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(ds.get(key), dict):
            _lay_over(ds[key], value)
        else:
            ds[key] = value
