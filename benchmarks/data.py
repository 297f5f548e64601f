"""Preparation: speed beside the tokenizer library alone, cost of each step, workers, what near-dedup finds, hashing.

Text is the interpreter's own standard library; the tokenizer a byte-level BPE of 8,192 ids trained on it.

- writing: cleaned text to published shards with hashes (tokenize, pack, write) in CPU time of one process, beside
  `encode_batch_fast` on the same texts and nothing else;
- steps: CPU time of reading a unit with one step on, over that of reading it with none;
- workers: wall time of the whole preparation with one and with two processes. It needs two idle cores;
- verify: MB/s of `pretrain data verify` beside plain SHA-256 of the same files, both on all cores;
- audit: training tokens a CPU-second past an index.

`python -P -m benchmarks.data writing audit` measures some parts only and keeps the others' results.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.harness import RESULTS, Comparison, Summary, compare, cpu_seconds, rounds, wall_seconds, write_results
from benchmarks.loader import write_shards
from benchmarks.planted import planted
from data_prep.audit import Side, audit
from data_prep.build import Build
from data_prep.config import PrepConfig
from data_prep.crew import available_cores
from data_prep.manifest import Manifest
from data_prep.pack import Packer
from data_prep.pipeline import prepare
from data_prep.plan import list_files
from data_prep.progress import Silent
from data_prep.shards import token_dtype
from data_prep.stats import stored_documents
from data_prep.texts import unit_texts
from data_prep.tokenizer import load_tokenizer, vocab_size
from data_prep.unit import Unit
from data_prep.verify import verify_dataset
from pretrain.runfolder.publish import hash_file

TEXT_BYTES = 6_000_000
GOAL, WORKERS_GOAL = 0.9, 1.8
BUSY = 1.5
"""Load of the machine, this benchmark's own 1 included, from which on wall time with two processes says nothing."""
STEPS: dict[str, dict[str, Any]] = {
    "none": {}, "normalize": {"clean": {"normalize": {}}}, "mask": {"clean": {"pii": {}}},
    "quality": {"clean": {"quality": {}}}, "web": {"clean": {"web": {}}},
    "language": {"clean": {"language": {"allow": ["en"]}}}, "near copies": {"dedup": {"near": {}}}}


def config_of(out: Path, **changes: Any) -> PrepConfig:
    """The standard library as a dataset."""
    return PrepConfig.model_validate({
        "out": str(out), "sources": [{"kind": "stdlib", "max_bytes": TEXT_BYTES}], "workers": 1, **changes})


def started(folder: Path, config: PrepConfig) -> Build:
    """Preparation in `folder` up to the point where everything is read and decided and the tokenizer is there."""
    (folder / "work").mkdir(parents=True)
    build = Build(config, folder, list_files(config), Silent())
    build.read(build.pieces)
    build.settle()
    return build


def writing(root: Path, tokenizer: Path) -> Comparison:
    """MB of text a CPU-second: shards from cleaned text, over the library's encoding of the same texts alone."""
    config = config_of(root / "unused", tokenizer={"path": str(tokenizer)})
    folder = root / "writing"
    build = started(folder, config)
    library, units = load_tokenizer(tokenizer), sorted((folder / "work" / "read").glob("[0-9]*.unit"))
    texts = [items[0].decode() for unit in units
             for _, block in unit_texts(unit, np.arange(len(Unit(unit)["size"])), 512) for items in block]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokens = folder / "work" / "tokens"

    def write() -> None:
        with Packer(config, folder, token_dtype(vocab_size(library))) as packer:
            for number in build.encode(lambda _: True):
                packer.add(Unit(tokens / units[number].name))

    def ours() -> float:
        for path in [*tokens.iterdir(), *folder.glob("*.tar"), *folder.glob("*.idx")]:
            path.unlink()
        return size / cpu_seconds(write)

    def encode(fresh: Tokenizer) -> None:
        for at in range(0, len(texts), 512):
            fresh.encode_batch_fast(texts[at:at + 512], add_special_tokens=False)  # nothing is kept, which is fastest

    def alone() -> float:
        return size / cpu_seconds(partial(encode, load_tokenizer(tokenizer)))  # one in use is slower
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return compare(ours, alone, unit="MB/CPU-s", pairs=6)


def steps(root: Path) -> dict[str, Summary]:
    """CPU microseconds a KB of text that reading takes with each step on."""
    def measure(name: str, changes: dict[str, Any]) -> float:
        folder = root / f"step-{name.replace(' ', '-')}"
        (folder / "work").mkdir(parents=True)
        config = config_of(root / "unused", **changes)
        build = Build(config, folder, list_files(config), Silent())
        taken = cpu_seconds(lambda: build.read(build.pieces))
        shutil.rmtree(folder)
        return 1e9 * taken / TEXT_BYTES
    return rounds({name: partial(measure, name, changes) for name, changes in STEPS.items()}, unit="us/KB", n=5)


def workers(root: Path, tokenizer: Path) -> Comparison:
    """Wall seconds of `pretrain prep` with one process, over two: 131 MB of the standard library and two packages."""
    packages = [Path(find_spec(name).origin or "").parent for name in ("torch", "transformers")]  # type: ignore[union-attr]
    config = {"out": str(root / "workers"), "tokenizer": {"path": str(tokenizer)}, "dedup": {"near": {}},
              "clean": {"normalize": {}, "pii": {}}, "sources": [{"kind": "stdlib"}, *(
                  {"kind": "python", "name": path.name, "path": str(path)} for path in packages)]}
    file = root / "workers.yaml"
    file.write_text(json.dumps(config))

    def run(count: int) -> float:
        command = [sys.executable, "-P", "-m", "pretrain.cli.main", "prep", str(file), "--set", f"workers={count}"]
        taken = wall_seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                                                    stderr=subprocess.DEVNULL))
        shutil.rmtree(root / "workers")
        return taken
    return compare(lambda: run(1), lambda: run(2), unit="s", pairs=3)


def copies(root: Path) -> dict[str, float]:
    """Recall and precision of near-dedup (b=20, r=8, 0.8) on 1,000 planted near copies, half of them below 0.8."""
    pairs = planted(1000)
    sources = []
    for name, side in (("a", 0), ("b", 1)):
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": pair[side]}) + "\n" for pair in pairs))
        sources.append({"kind": "jsonl", "name": name, "path": str(path)})
    manifest = prepare(config_of(root / "copies", sources=sources, dedup={"near": {}}, tokenizer={"vocab_size": 300}))
    kept = {d.provenance["line"] for split in manifest.splits for d in stored_documents(manifest.split(split))
            if d.provenance["source"] == "b"}
    dropped = set(range(1, 1001)) - kept
    alike = {number for number, pair in enumerate(pairs, 1) if pair[2] >= 0.8}
    return {"copies of 0.8 and above": len(alike), "dropped": len(dropped),
            "recall": len(dropped & alike) / len(alike), "precision": len(dropped & alike) / max(1, len(dropped))}


def verify(root: Path) -> Comparison:
    """MB/s of verification over hashing the same files, 256 MB in the page cache, all cores."""
    dataset = write_shards(root / "verify", 128 * 2**20, blocks_per_shard=512).folder
    files = sorted(dataset.glob("*.tar"))
    size = sum(path.stat().st_size for path in files) / 1e6

    def plain() -> float:
        with ThreadPoolExecutor(available_cores()) as pool:
            return size / wall_seconds(lambda: list(pool.map(hash_file, files)))
    return compare(lambda: size / wall_seconds(lambda: _sound(dataset)), plain, unit="MB/s")


def _sound(dataset: Path) -> None:
    if verify_dataset(dataset).faults:
        raise RuntimeError(f"{dataset} has faults")


def audit_speed(dataset: Path) -> dict[str, Summary]:
    """Million training tokens a CPU-second, index building included."""
    tokens = Manifest.load(dataset).splits["train"].tokens / 1e6
    sides = Side(dataset, "train"), Side(dataset, "val")
    measures: dict[str, Callable[[], float]] = {
        "word": lambda: tokens / cpu_seconds(lambda: audit(*sides, level="word")),
        "token": lambda: tokens / cpu_seconds(lambda: audit(*sides, level="token"))}
    return rounds(measures, unit="Mtokens/CPU-s", n=5)


def main(chosen: list[str]) -> None:
    """Measure all parts, or the chosen ones, in a temporary folder; ten minutes. Each is kept as it is done."""
    kept = RESULTS / "data.json"
    found: dict[str, Any] = json.loads(kept.read_text())["results"] if chosen and kept.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = None if not chosen or "audit" in chosen else TEXT_BYTES
        made = prepare(config_of(root / "made", tokenizer={"vocab_size": 8192}, workers=available_cores(),
                                 sources=[{"kind": "stdlib", "max_bytes": size}], blocks_per_shard=64))
        tokenizer = made.folder / "tokenizer.json"
        parts: dict[str, Callable[[], Any]] = {
            "writing": lambda: writing(root, tokenizer), "near_copies": lambda: copies(root),
            "reading_with_step": lambda: steps(root), "verify": lambda: verify(root),
            "audit": lambda: audit_speed(made.folder), "workers": lambda: _if_quiet(lambda: workers(root, tokenizer))}
        for part in chosen or parts:
            found[part] = parts[part]()
            print(f"{part}: {found[part]}", flush=True)
            write_results("data", {"text": f"standard library of {sysconfig.get_python_version()}", **found,
                                   "writing_goal": GOAL, "workers_goal": WORKERS_GOAL})


def _if_quiet(measure: Callable[[], Comparison]) -> Comparison | str:
    load = os.getloadavg()[0]
    return measure() if load < BUSY else f"not measured: the load of the machine was {load:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
