"""What stands under the addresses of AFRB's matrix memory, in random ids and in real text: how often contexts come
again, how many directions their keys use, and how much of other tokens a read returns beside the right one.

A read is a sum over all that was written, token by token: r = sum over y of c_y v_y, c_y the product of the asked
address with everything written under y. With values wide enough to tell tokens apart, a read is right where the wanted
token's c is the largest. Hebbian writes add up where text repeats itself; the delta rule writes what is missing.

Run by name, where the small backbone and its shards are: `python -m benchmarks.afrb_collisions`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import write_results
from evaluation.target import Target, open_target
from pretrain.config.needle import NeedleConfig
from pretrain.data.needle import NeedleSource
from pretrain.models.afrb.memory import MatrixMemory
from pretrain.ops.associative_memory import delta_corrections, fading, read_rows
from pretrain.ops.phase import phase_taps

EXAMPLES, BLOCK = 40, 10
TAPS = 4
TEXT = ["data.source.haystack=shards", "data.source.haystack_path=data/stdlib-32k"]
HAYSTACKS = {"random ids": [], "real text": TEXT}
LENGTHS = (512, 2048)
WIDTHS = (256, 512, 1024)
RATES = (None, 0.1, 0.6, 1.0)
"""Of the delta rule; None: values are added."""


def addresses(target: Target, ids: Tensor) -> Tensor:
    """[B, T, dk] of tokens [B, T], as the memory makes them: normalised sums of the last turned tokens."""
    model = target.model
    memory: MatrixMemory = model.memory
    rows = F.normalize(memory.input_rows(model.get_input_embeddings()(ids)), dim=-1)
    angles = torch.arange(TAPS)[:, None, None, None] * memory.turn
    return F.normalize(phase_taps(rows @ memory.key.T, angles, memory.tap_weights), dim=-1)


def contexts(ids: np.ndarray) -> dict[str, float]:
    """Of each token's last four: how many are met for the first time, and the most often met one's share."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, TAPS, axis=1)
    new, most = [], []
    for row in windows:
        _, counts = np.unique(row, axis=0, return_counts=True)
        new.append(len(counts) / len(row))
        most.append(counts.max() / len(row))
    tokens = [np.unique(row, return_counts=True)[1].max() / len(row) for row in ids]
    return {"contexts_met_first": float(np.mean(new)), "most_frequent_context": float(np.mean(most)),
            "most_frequent_token": float(np.mean(tokens))}


def directions(keys: Tensor) -> float:
    """Participation ratio of the keys [B, T, K], (sum of eigenvalues)^2 / sum of squares: how many they spread over."""
    gram = keys.transpose(1, 2) @ keys
    return float((gram.diagonal(dim1=1, dim2=2).sum(1).square() / gram.square().sum((1, 2))).mean())


def reads(asked: Tensor, rows: Tensor, keys: Tensor, ids: Tensor, wanted: Tensor, rate: float | None
          ) -> tuple[Tensor, Tensor]:
    """(c of the wanted tokens, the largest of another token's) [B, R], at addresses [B, R, K] asked at `rows`."""
    own, others = [], []
    for b in range(len(ids)):
        seen, places = ids[b].unique(return_inverse=True)
        values = F.one_hot(places, len(seen)).float()[None]
        fades = fading(1, ids.shape[1], 1.0)
        if rate is not None:
            values = delta_corrections(keys[b:b + 1], values, rate, fades)
        found = read_rows(asked[b:b + 1], rows[b:b + 1], keys[b:b + 1], values, fades)[0]
        right = torch.searchsorted(seen, wanted[b])[:, None]
        own.append(found.gather(1, right)[:, 0])
        others.append(found.scatter(1, right, -torch.inf).amax(1))
    return torch.stack(own), torch.stack(others)


@torch.no_grad()
def measure(haystack: list[str], length: int, width: int) -> dict[str, Any]:
    """Figures of the test split's first needles, fed the right answers."""
    target = open_target("afrb-retrieve-small", sets=[*haystack, f"data.source.ctx_chunks={length // 128}",
                                                      f"model.pvm_dk={width}"])
    assert target.config is not None and isinstance(target.config.data.source, NeedleConfig)
    source = NeedleSource(target.config.data.source.model_copy(update={"split": "test"}))
    spread, results = [], {rate: ([], []) for rate in RATES}  # type: ignore[var-annotated]
    everything = source.get(np.arange(EXAMPLES))
    for start in range(0, EXAMPLES, BLOCK):
        batch = everything.rows(start, start + BLOCK)
        ids, rows = batch["input_ids"], batch["readout_positions"]
        address = addresses(target, ids)
        keys = F.pad(address, (0, 0, 1, 0))[:, :-1]
        asked = address.gather(1, rows[..., None].expand(-1, -1, address.shape[-1]))
        wanted = batch["labels"].gather(1, rows)
        spread.append(directions(keys))
        for rate in RATES:
            for kept, new in zip(results[rate], reads(asked, rows, keys, ids, wanted, rate), strict=True):
                kept.append(new)
    found: dict[str, Any] = {**contexts(everything["input_ids"][:, :length].numpy()),
                             "directions": float(np.mean(spread))}
    for rate, (own, others) in results.items():
        mine, other = torch.cat(own), torch.cat(others)
        name = "added" if rate is None else f"delta {rate:g}"
        found[name] = {"right_is_largest": float((mine > other).float().mean()), "answers": mine.numel(),
                       "right": float(mine.median()), "largest_other": float(other.median()),
                       "other_over_right": float((other / mine).median())}
    return found


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for kind, haystack in HAYSTACKS.items():
        for length in LENGTHS:
            for width in WIDTHS:
                key = f"{kind}, {length} tokens, addresses of {width}"
                results[key] = found = measure(haystack, length, width)
                rates = {name: round(row["right_is_largest"], 4) for name, row in found.items()
                         if isinstance(row, dict)}
                print(f"{key}: {found['contexts_met_first']:.0%} of contexts are new, {found['directions']:.0f} "
                      f"directions; right is largest {rates}", flush=True)
    write_results("afrb_collisions", results)


if __name__ == "__main__":
    main()
