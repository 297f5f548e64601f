"""The stages of preparation on one core, each by itself: what a plan for many tokens is made of.

Reading with exact hashes, deciding, encoding with the byte-level BPE of 8,192 ids, and packing into hashed shards. The
first three are shared by any number of processes and machines; packing is done by one process a dataset.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.data import TEXT_BYTES, config_of
from benchmarks.harness import Summary, cpu_seconds, write_results
from data_prep.build import Build
from data_prep.config import PrepConfig
from data_prep.pack import Packer
from data_prep.pipeline import prepare
from data_prep.plan import list_files
from data_prep.progress import Silent
from data_prep.shards import token_dtype
from data_prep.unit import Unit

ROUNDS = 6


def measure(config: PrepConfig, folder: Path) -> dict[str, float]:
    """CPU seconds of each stage, bytes of text and tokens, once."""
    (folder / "work").mkdir(parents=True)
    build = Build(config, folder, list_files(config), Silent())
    read = cpu_seconds(lambda: build.read(build.pieces))
    build.settle()
    encode = cpu_seconds(lambda: list(build.encode(lambda _: True)))
    units = [Unit(path) for path in sorted((folder / "work" / "tokens").glob("*.unit"))]

    def write() -> None:
        with Packer(config, folder, token_dtype(8192)) as packer:
            for unit in units:
                packer.add(unit)
    pack = cpu_seconds(write)
    shutil.rmtree(folder)
    return {"read": read, "encode": encode, "pack": pack, "tokens": sum(len(unit["tokens"]) for unit in units),
            "bytes": sum(int(unit["size"].sum()) for unit in units)}


def main() -> None:
    """Measure in a temporary folder; a minute."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = prepare(config_of(root / "made", tokenizer={"vocab_size": 8192})).folder / "tokenizer.json"
        config = config_of(root / "unused", tokenizer={"path": str(tokenizer)})
        runs = [measure(config, root / "build") for _ in range(ROUNDS + 1)][1:]
    size, tokens = runs[0]["bytes"], runs[0]["tokens"]
    found = {stage: Summary.of([size / 1e6 / run[stage] for run in runs], "MB/CPU-s") for stage in ("read", "encode")}
    found["pack"] = Summary.of([tokens / 1e6 / run["pack"] for run in runs], "Mtokens/CPU-s")
    for stage, summary in found.items():
        print(f"{stage}: {summary}")
    print(f"{size / tokens:.2f} bytes a token")
    write_results("data_stages", {"text_bytes": TEXT_BYTES, "bytes_a_token": size / tokens, **found})


if __name__ == "__main__":
    main()
