"""The terms of the time of a step (`pretrain estimate --gpu`), each beside what this CPU takes for it.

Hardware's figures are measured first, by operations that are none of training: a matrix product, a copy, an all-reduce,
a file. Then each term of a real model is measured alone: forward and backward, AdamW with clipping, an all-reduce of
the gradients, a checkpoint's bytes. A ratio is measured over predicted; that of compute is 1 / efficiency.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Summary, cpu_seconds, wall_seconds, write_results
from pretrain.config.cost import Hardware, step_time
from pretrain.config.load import load_run_config
from pretrain.config.plan import make_plan

PRESET, MICRO, ROUNDS = "baseline-27m", 2, 7
SETS = ("data.source={kind: synthetic}", "data.source.vocab_size=8000", "data.source.samples=4096", "data.seq_len=512",
        "engine.zero_stage=2", "engine.precision=fp32", "checkpoint.every=1 steps",
        f"batch={{global_batch_size: {2 * MICRO}, micro_batch_size: {MICRO}}}")


def best(work: Callable[[], object], clock: Callable[[Callable[[], object]], float],
         rounds: int = ROUNDS) -> list[float]:
    """Seconds of each round after one to warm up."""
    work()
    return [clock(work) for _ in range(rounds)]


def hardware(folder: Path) -> dict[str, float]:
    """What this machine does a second, one thread: FLOP, bytes copied in memory, bytes written and flushed."""
    import torch
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / min(best(lambda: a @ b, cpu_seconds))
    source, target = torch.zeros(2**26), torch.zeros(2**26)
    copied = 2 * 4 * 2**26 / min(best(lambda: target.copy_(source), cpu_seconds))
    block = os.urandom(2**26)

    def write() -> None:
        with open(folder / "block", "wb") as file:
            file.write(block)
            os.fsync(file.fileno())
    return {"flops": flops, "memory": copied, "disk": len(block) / min(best(write, wall_seconds, 3))}


def one_rank(folder: Path) -> dict[str, list[float]]:
    """CPU seconds of forward with backward, and of clipping with AdamW, of the model; wall seconds of its save."""
    import torch

    from pretrain.config.registry import FAMILIES, resolve
    from pretrain.models.base import BuildContext
    config = load_run_config(PRESET, SETS).config
    family = resolve(FAMILIES, config.model.family, "model.family")
    model = family.build(config.model, BuildContext(dtype=torch.float32, device=torch.device("cpu"), seed=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 8000, (MICRO, config.data.seq_len))

    def passes() -> None:
        output = model(input_ids=ids, labels=ids)
        (output.nll_sum / output.n_tokens).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found = {"compute": best(passes, cpu_seconds), "optimizer": best(update, cpu_seconds)}

    def save() -> None:
        with open(folder / "checkpoint", "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
    return {**found, "saves": best(save, wall_seconds, 3)}


def rank(folder: Path) -> None:
    """One of two ranks: wall seconds of all-reduces of 16 MB and of the model's gradients."""
    import torch
    import torch.distributed as dist

    from pretrain.engine.distributed import join, shutdown
    from pretrain.engine.ranks import rank_environment
    own = rank_environment(os.environ)
    assert own is not None
    world = join(own, timeout_s=120)
    numel = load_run_config(PRESET, SETS).config.model.parameter_count().trainable
    for name, size in (("small", 2**22), ("gradients", numel)):
        tensor, times = torch.ones(size), []
        for _ in range(ROUNDS + 1):
            world.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        if world.is_main:
            (folder / name).write_text(json.dumps(times[1:]))
    shutdown(0, world)


def main() -> None:
    """All terms on this machine."""
    from pretrain.engine.launcher import launch, worker_command
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = hardware(folder)
        if launch(worker_command("benchmarks.cost", "rank", name), 2, threads=1):
            raise SystemExit("the ranks failed")
        sent = {part: json.loads((folder / part).read_text()) for part in ("small", "gradients")}
        measured = {**one_rank(folder), "gradients sent": sent["gradients"]}
    figures["link"] = 4 * 2**22 / min(sent["small"])  # a ring of two ranks sends each byte once
    config = load_run_config(PRESET, SETS).config
    card = Hardware(figures["flops"], 1.0, figures["link"], figures["memory"], figures["disk"])
    two = step_time(config, make_plan(config, 2, precision="fp32", device="cpu"), card)
    alone = load_run_config(PRESET, [*SETS, f"batch={{global_batch_size: {MICRO}}}", "engine.zero_stage=0"]).config
    one = step_time(alone, make_plan(alone, 1, precision="fp32", device="cpu"), card)
    predicted = {term.name: term.seconds for term in (*one.terms, two.communication[0])}
    results: dict[str, Any] = {"hardware": figures, "model": PRESET, "terms": {}}
    for term, times in measured.items():
        ratio = Summary.of([seconds / predicted[term] for seconds in times], "x")
        results["terms"][term] = {"predicted_seconds": predicted[term], "measured_over_predicted": ratio}
        print(f"{term:<16}{predicted[term]:9.4f} s predicted, {statistics.median(times):9.4f} s measured, {ratio}")
    write_results("cost", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]))
    else:
        main()
