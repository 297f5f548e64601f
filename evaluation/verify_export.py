"""Loads an export as a stranger would and reports how far its logits, or vectors, are from stored ones.

Run as `python -P -m evaluation.verify_export FOLDER REFERENCE DTYPE MODULE CONTROLS`. Prints one line of JSON. A native
export is loaded by transformers alone: MODULE, which registers one of our architectures, is then empty.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def largest_difference(folder: str, reference: str, dtype: str, module: str, controls: str) -> float:
    """Largest difference of a logit (of encoders: a coordinate) over the largest stored one; infinite where one is not
    finite."""
    if module:
        importlib.import_module(module)
    stored = load_file(reference)
    if "logits" not in stored:
        from evaluation.encoder_export import vectors_differ_by
        return vectors_differ_by(folder, stored, dtype)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtypes[dtype], local_files_only=True,
                                                       use_safetensors=True, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"missing weights {sorted(info['missing_keys'])}, unknown {sorted(info['unexpected_keys'])}")
    extra: dict[str, Any] = {"return_logits": True} if module else {}
    if module and json.loads(controls):
        extra["controls"] = json.loads(controls)
    with torch.no_grad():
        logits = model.eval()(input_ids=stored["input_ids"], **extra).logits.float()
    difference = (logits - stored["logits"]).abs().max() / stored["logits"].abs().max()
    return float(difference) if bool(torch.isfinite(logits).all()) else float("inf")


if __name__ == "__main__":
    logging.disable_progress_bar()
    print(json.dumps({"largest_difference": largest_difference(*sys.argv[1:])}))
