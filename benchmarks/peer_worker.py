"""The other side of `benchmarks.peers`: runs in their environment and imports nothing of ours.

Each function does one thing as that package's documentation has it, on files that both sides read.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """CPU seconds of this process and its threads, wall seconds, and what `work` returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "found": found}


def versions(names: list[str]) -> dict[str, Any]:
    """Versions of packages."""
    return {name: importlib.metadata.version(name) for name in names}


def datatrove(text: str, tokenizer: str, eos: str, out: str) -> dict[str, Any]:
    """JSON lines to a file of tokens with an index of documents, in order, in one process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger
    logger.remove()
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)

    def run() -> int:
        steps = [JsonlReader(str(Path(text).parent), glob_pattern=Path(text).name),
                 DocumentTokenizer(str(folder / "tokens"), tokenizer, eos_token=eos, shuffle_documents=False,
                                   batch_size=512)]
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(folder / "log")).run()
        return sum(path.stat().st_size // 2 for path in (folder / "tokens").glob("*.ds"))
    return measured(run)


def slices(part: tuple[str, int, int]) -> Iterator[np.ndarray]:
    """Pieces of a file of tokens, for litdata's optimize."""
    path, start, stop = part
    yield np.fromfile(path, "<u2", stop - start, offset=2 * start)


def write_litdata(tokens: str, window: int, out: str) -> dict[str, Any]:
    """A file of tokens as litdata's chunks of 64 MB, from which its token loader cuts windows."""
    import litdata
    size = Path(tokens).stat().st_size // 2 // window * window
    step = window * 512
    parts = [(tokens, at, min(at + step, size)) for at in range(0, size, step)]
    litdata.optimize(fn=slices, inputs=parts, output_dir=out, chunk_bytes="64MB", num_workers=1,
                     item_loader=litdata.TokensLoader(block_size=window), verbose=False)
    return {}


def write_mosaicml(tokens: str, window: int, out: str) -> dict[str, Any]:
    """A file of tokens as MDS, a sample a window."""
    MDSWriter = _streaming().MDSWriter
    content = np.fromfile(tokens, "<u2")
    with MDSWriter(out=out, columns={"tokens": f"ndarray:uint16:{window}"}, size_limit=1 << 26) as writer:
        for at in range(0, len(content) // window * window, window):
            writer.write({"tokens": content[at:at + window]})
    return {}


def _streaming() -> Any:
    """The package; of torchvision, which its image datasets import, only the name is needed for tokens."""
    try:
        import streaming
    except (ImportError, RuntimeError):
        from unittest.mock import MagicMock
        for name in [name for name in sys.modules if name.split(".")[0] in ("streaming", "torchvision")]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms",
                     "torchvision.transforms.functional"):
            sys.modules[name] = MagicMock(VisionDataset=object)
        import streaming
    return streaming


_datasets: dict[tuple[str, str], Any] = {}


def _loader(kind: str, folder: str, window: int, batch: int) -> Any:
    from torch.utils.data import DataLoader
    if (kind, folder) not in _datasets:
        if kind == "litdata":
            import litdata
            dataset = litdata.StreamingDataset(folder, item_loader=litdata.TokensLoader(block_size=window),
                                               shuffle=True, drop_last=False)
        else:
            dataset = _streaming().StreamingDataset(local=folder, shuffle=True, batch_size=batch)
        _datasets[kind, folder] = dataset
    dataset = _datasets[kind, folder]
    if kind == "litdata":
        import litdata
        return litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=0)
    return DataLoader(dataset, batch_size=batch, num_workers=0)


def epoch(kind: str, folder: str, window: int, batch: int) -> dict[str, Any]:
    """Windows of one shuffled epoch as input_ids and labels."""
    import torch
    torch.set_num_threads(1)
    loader = _loader(kind, folder, window, batch)

    def run() -> int:
        found = 0
        for rows in loader:
            tokens = (rows if kind == "litdata" else rows["tokens"]).to(torch.int64)
            input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            found += len(input_ids) and len(labels)
        return found
    return measured(run)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (versions, datatrove, write_litdata, write_mosaicml, epoch)}


def main() -> None:
    """Answer line by line. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = TASKS[asked.pop("task")](**asked)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
