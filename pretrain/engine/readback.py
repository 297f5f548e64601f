"""What DeepSpeed really does, read back from the engine and compared with what was asked."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.engine.build import Engine

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def differences(engine: Engine) -> list[str]:
    """One line for every field whose value in the running engine is not the one that was written."""
    ds, asked = engine.ds, engine.config
    checks: dict[str, tuple[Any, Any]] = {
        "zero stage": (engine.stage, int(ds.zero_optimization_stage())),
        "train_batch_size": (asked["train_batch_size"], ds.train_batch_size()),
        "gradient_accumulation_steps": (asked["gradient_accumulation_steps"], ds.gradient_accumulation_steps()),
        "micro batch": (asked["train_micro_batch_size_per_gpu"], ds.train_micro_batch_size_per_gpu()),
        "gradient_clipping": (asked["gradient_clipping"], ds.gradient_clipping()),
        "bf16": (engine.precision == "bf16", bool(ds.bfloat16_enabled())),
        "fp16": (engine.precision == "fp16", bool(ds.fp16_enabled())),
        "parameter dtype": (_DTYPE[engine.precision], next(iter(engine.model.parameters())).dtype),
        "optimizer class": (_expected_optimizer(engine.stage), type(ds.optimizer).__name__),
        "world size": (engine.world.size, ds.dp_world_size),
        "lr scheduler": (None, ds.lr_scheduler),
        "gradients averaged over ranks": (True, bool(ds.gradient_average)),
    }
    if engine.stage and engine.precision != "fp32":
        checks["gradient accumulation dtype"] = (torch.float32, ds.get_data_types()[1])
    if engine.stage:
        checks["bf16 overflow check"] = (True, engine.precision != "bf16" or bool(ds.optimizer.check_grad_overflow)
                                         if hasattr(ds.optimizer, "check_grad_overflow") else True)
    return [f"{name}: asked {want}, DeepSpeed uses {have}" for name, (want, have) in checks.items() if want != have]


def _expected_optimizer(stage: int) -> str:
    return ("AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")[stage]
