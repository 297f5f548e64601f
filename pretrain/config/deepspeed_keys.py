"""Which DeepSpeed keys a config may set by hand: known to DeepSpeed 0.19.8 and not decided by another section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.config.suggest import nearest
from pretrain.errors import ConfigError

OWNED = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "managed_gradient_accumulation": "batch.gradient_accumulation_steps",
    "gradient_clipping": "optim.grad_clip",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "data_types": "engine.precision",
    "torch_autocast": "engine.precision",
    "optimizer": "optim",
    "scheduler": "schedule",
    "checkpoint": "checkpoint",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload.optimizer",
    "zero_optimization.offload_param": "engine.offload.parameters",
}
"""Keys that other sections decide, and which."""

_TOP = frozenset((
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
    "sparse_gradients", "disable_allgather", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "disable_python_gc", "flops_profiler", "comms_logger", "activation_checkpointing", "aio", "compile",
    "data_efficiency", "compression_training", "elasticity", "tensor_parallel", "timers", "tensorboard", "wandb",
    "csv_monitor", "comet", "zenflow", "legacy_fusion", "use_data_before_expert_parallelism"))
_ZERO = frozenset((
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "zenflow", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "leaf_module"))


def problems(extra: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What is wrong with `engine.deepspeed`: keys that contradict another section, and keys nobody knows."""
    zero = extra.get("zero_optimization")
    named = [(key, _TOP) for key in extra] + [(f"zero_optimization.{key}", _ZERO) for key in
                                              (zero if isinstance(zero, Mapping) else ())]
    for dotted, known in named:
        leaf = dotted.rpartition(".")[2]
        if dotted in OWNED:
            yield ConfigError(f"engine.deepspeed.{dotted}", f"contradicts {OWNED[dotted]}, which decides it; set that")
        elif leaf not in known:
            yield ConfigError(f"engine.deepspeed.{dotted}", f"DeepSpeed knows no such key{nearest(leaf, known)}")
