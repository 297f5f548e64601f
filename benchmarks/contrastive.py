"""The contrastive step beside sentence-transformers' cached loss, beside itself without caching, and its memory.

One process, fp32, a BERT of 2 blocks and width 128 with the same weights on every side. A step is forward, loss,
backward and AdamW, and is counted in CPU time; tokens are real ones, padding is not counted.

- peer: `CachedMultipleNegativesRankingLoss` with the same batch, chunk and texts. Its chunks are cut in the order of
  the batch and padded to the batch's longest text; ours are sorted by length first. Both ways are also measured with
  texts of one length, where that makes no difference. Its loss has one direction, ours both.
- caching: our step with and without it (the chunks then keep their graphs: a forward less), texts of one length.
- memory: peak RSS above the built model, of one cached step in a process of its own, by batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import compare, cpu_seconds, write_results
from pretrain.config.contrastive import ContrastiveConfig
from pretrain.data.batch import Batch
from pretrain.models.base import BuildContext
from pretrain.models.baseline.family import build
from pretrain.models.baseline.schema import BaselineConfig
from pretrain.monitor.memory import current_rss, peak_rss, reset_peak_rss
from pretrain.objectives.contrastive import Contrastive

BATCH, CHUNK, QUERY, PASSAGE, VOCAB = 256, 32, 24, 64, 4096
BATCHES = (256, 1024, 4096)
MODEL = BaselineConfig(body="bert", vocab_size=VOCAB, hidden_size=128, num_layers=2, num_heads=4,
                       intermediate_size=256, max_position_embeddings=128, dropout=0.1)


def texts(batch: int, *, ragged: bool, query: int = QUERY) -> Batch:
    """Random pairs; ragged: lengths from a quarter of the longest on, else all of the longest."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for side, width in (("query", query), ("positive", PASSAGE)):
        shortest = width // 4 if ragged else width
        lengths = torch.randint(shortest, width + 1, (batch,), generator=draw)
        mask = torch.arange(width) < lengths[:, None]
        ids = torch.randint(2, VOCAB, (batch, width), generator=draw)
        tensors |= {f"{side}_input_ids": ids * mask, f"{side}_attention_mask": mask}
    numbers = torch.arange(batch)
    return Batch(numbers, {**tensors, "query_ids": numbers, "passage_ids": numbers + batch})


def real_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    return int(batch["query_attention_mask"].sum() + batch["positive_attention_mask"].sum())


class Handle:
    """One process without an engine."""

    step, total_steps, rank, world = 0, 100, 0, 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def forward(self, batch: Batch, *, grad: bool, rng: object = None) -> Any:
        if rng is not None:
            torch.set_rng_state(rng)
        with torch.set_grad_enabled(grad):
            return self.model(**batch.tensors)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


def stepper(model: nn.Module, backward: Callable[[], object]) -> Callable[[], object]:
    """A whole update around `backward`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def ours(batch: Batch, *, cached: bool) -> Callable[[], object]:
    """Our step, chunks of CHUNK."""
    model = build(MODEL, BuildContext(seed=0)).train()
    objective = Contrastive(ContrastiveConfig(grad_cache=cached))
    parts = [Batch(batch.sample_ids[i:i + CHUNK], {name: value[i:i + CHUNK] for name, value in batch.tensors.items()})
             for i in range(0, len(batch), CHUNK)]
    handle: Any = Handle(model)
    return stepper(model, lambda: objective.run(handle, parts, {}))


class Wrapped(nn.Module):
    """Our encoder as a module of sentence-transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> Mapping[str, Tensor]:
        vectors = self.model(features["input_ids"], features["attention_mask"]).heads["mean"]
        return {**features, "sentence_embedding": nn.functional.normalize(vectors, dim=1)}


def peer(batch: Batch) -> Callable[[], object]:
    """The step of sentence-transformers with the same weights, chunks of CHUNK."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    model = SentenceTransformer(modules=[Wrapped(build(MODEL, BuildContext(seed=0)))], device="cpu").train()
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / 0.05, mini_batch_size=CHUNK)
    features = [{"input_ids": batch[f"{side}_input_ids"], "attention_mask": batch[f"{side}_attention_mask"]}
                for side in ("query", "positive")]
    return stepper(model, lambda: loss([dict(each) for each in features], None).backward())


def memory(batch: int) -> None:
    """Print peak RSS above the built model of one cached step."""
    pairs, step = texts(batch, ragged=False), None
    ours(texts(CHUNK, ragged=False), cached=True)()  # libraries and their buffers
    step = ours(pairs, cached=True)
    base = current_rss()
    reset_peak_rss()
    step()
    print(json.dumps(peak_rss() - base))


def main() -> None:
    """Measure and keep the results."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rounds = int(os.environ.get("BENCH_PAIRS", "10"))
    found: dict[str, Any] = {"batch": BATCH, "chunk": CHUNK, "parameters": MODEL.parameter_count().total}
    for name, ragged in (("ragged", True), ("one length", False)):
        batch = texts(BATCH, ragged=ragged)
        mine, other = ours(batch, cached=True), peer(batch)
        result = compare(lambda: cpu_seconds(mine), lambda: cpu_seconds(other), unit="s", pairs=rounds)  # noqa: B023
        tokens = real_tokens(batch)
        found[f"step over sentence-transformers, {name}"] = {
            "seconds": result, "tokens": tokens, "tokens_per_cpu_second": {
                "ours": tokens / result.ours.median, "sentence-transformers": tokens / result.other.median}}
        print(f"{name}: ours / sentence-transformers {result.ratio}; {tokens / result.ours.median:,.0f} and "
              f"{tokens / result.other.median:,.0f} tokens a CPU-second", flush=True)
    batch = texts(BATCH, ragged=False, query=PASSAGE)
    cached, plain = ours(batch, cached=True), ours(batch, cached=False)
    result = compare(lambda: cpu_seconds(cached), lambda: cpu_seconds(plain), unit="s", pairs=rounds)
    found["cached step over uncached"] = result
    print(f"cached / uncached: {result.ratio}", flush=True)
    peaks = {}
    for size in BATCHES:
        done = subprocess.run([sys.executable, "-P", "-m", "benchmarks.contrastive", "memory", str(size)],
                              capture_output=True, text=True, check=True, timeout=1800)
        peaks[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(f"batch {size}: {peaks[str(size)] / 2**20:.0f} MiB above the model", flush=True)
    found["peak bytes of a cached step by batch"] = peaks
    write_results("contrastive", found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        torch.set_num_threads(1)
        memory(int(sys.argv[2]))
    else:
        main()
