"""How much of a token's output row its input row tells: what a map between the tables could echo at best.

The published figure of AFRB rewards a model that repeats the token it is looking at. Without attention that takes a map
from input rows to vectors whose largest product is with the output row of the same token. A ridge regression on four
fifths of the tokens, judged on the rest, says whether the tables of a backbone hold such a map.

Run by name, where the folders of the backbones are: `python -m benchmarks.afrb_tables`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import write_results

MODELS = Path("models")
RIDGE = 1e-3


def named(tensors: dict[str, Tensor], part: str) -> Tensor | None:
    """The one tensor with this part in its name."""
    return next((value for name, value in tensors.items() if part in name), None)


def measure(folder: Path) -> dict[str, float | int | bool]:
    """Held-out rate at which the mapped input row's first choice is its own token, and R2 of the map."""
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    inputs, outputs = named(tensors, "embed_tokens"), named(tensors, "lm_head")
    assert inputs is not None
    tied = outputs is None or torch.equal(inputs, outputs)
    x, y = inputs.double(), (inputs if outputs is None else outputs).double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, fitted = order[:len(x) // 5], order[len(x) // 5:]
    mean_x, mean_y = x[fitted].mean(0), y[fitted].mean(0)
    a, b = x[fitted] - mean_x, y[fitted] - mean_y
    gram = a.T @ a
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    mapped = (x[held] - mean_x) @ torch.linalg.solve(gram, a.T @ b) + mean_y
    hits = (mapped @ y.T).argmax(1) == held
    error = (mapped - y[held]).square().sum() / (y[held] - mean_y).square().sum()
    return {"tied": tied, "tokens": len(held), "first_choice": float(hits.double().mean()), "r2": 1 - float(error)}


def main() -> None:
    torch.set_num_threads(1)
    found = {folder.name: measure(folder) for folder in sorted(MODELS.iterdir())}
    for name, figures in found.items():
        print(name, figures)
    write_results("afrb_tables", found)


if __name__ == "__main__":
    main()
