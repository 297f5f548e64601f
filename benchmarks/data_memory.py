"""Memory of preparation at 100 and 400 MB of input under the same `--memory`: near-dedup, cleaning and training on.

Text is the standard library and site-packages; passes after the first change every seventh word, so that none is a
copy. Memory is the sum over all processes of the proportional set size (a shared page counts once), sampled while the
command runs; anonymous memory is shown beside it, as mapped files can be dropped by the kernel at any time.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from benchmarks.harness import write_results

SIZES_MB = (100, 400)
MEMORY = "1 GB"
GOAL = 1.2
DOCUMENT_BYTES = 4000


def documents() -> Iterator[str]:
    """Pieces of real source text, without end."""
    paths = sysconfig.get_paths()
    files = sorted({*Path(paths["stdlib"]).rglob("*.py"), *Path(paths["purelib"]).rglob("*.py")})
    for number in itertools.count():
        for path in files:
            text = path.read_text(errors="replace").replace("\0", "")
            for at in range(0, len(text), DOCUMENT_BYTES):
                piece = text[at:at + DOCUMENT_BYTES]
                if number:
                    words = piece.split(" ")
                    words[::7] = [f"{word}{number}" for word in words[::7]]
                    piece = " ".join(words)
                yield piece


def write_input(path: Path, size: int) -> None:
    """JSON lines of `size` bytes of text."""
    left = size
    with path.open("w") as file:
        for text in documents():
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text.encode())
            if left <= 0:
                return


def _proportional(process: psutil.Process) -> tuple[int, int]:
    """(all, anonymous) proportional bytes of a process."""
    found = {"Pss": 0, "Pss_Anon": 0}
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found["Pss"], found["Pss_Anon"]


def peak(command: list[str]) -> tuple[float, float, float]:
    """(MB, anonymous MB) at the peaks of a command and its children, and its seconds."""
    started = time.monotonic()
    said = tempfile.TemporaryFile()  # a pipe that nobody reads would stop a command that says much  # noqa: SIM115
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    most, most_anonymous = 0, 0
    while process.poll() is None:
        total = anonymous = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                both = _proportional(each)
            except (OSError, psutil.Error):
                continue
            total, anonymous = total + both[0], anonymous + both[1]
        most, most_anonymous = max(most, total), max(most_anonymous, anonymous)
        time.sleep(0.2)
    if process.returncode:
        said.seek(0)
        raise RuntimeError(f"left with {process.returncode}: {said.read().decode()[-2000:]}")
    return most / 1e6, most_anonymous / 1e6, time.monotonic() - started


def main() -> None:
    """Prepare both sizes in a temporary folder."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for size in SIZES_MB:
            write_input(root / f"{size}.jsonl", size * 10**6)
            config = {"out": str(root / f"out-{size}"), "memory": MEMORY, "workers": 2,
                      "sources": [{"kind": "jsonl", "name": "text", "path": str(root / f"{size}.jsonl")}],
                      "clean": {"normalize": {}}, "dedup": {"near": {}},
                      "tokenizer": {"vocab_size": 8192, "sample_bytes": 16_000_000}}
            (root / f"{size}.yaml").write_text(yaml.safe_dump(config))
            total, anonymous, seconds = peak([sys.executable, "-m", "pretrain.cli.main", "prep",
                                              str(root / f"{size}.yaml"), "--log-level", "warning"])
            counts = json.loads((root / f"out-{size}" / "manifest.json").read_bytes())["provenance"]["counts"]["text"]
            found[f"{size} MB"] = {"peak_mb": total, "peak_anonymous_mb": anonymous, "seconds": seconds,
                                   "documents": {reason: entry["documents"] for reason, entry in counts.items()}}
            print(size, found[f"{size} MB"], flush=True)
    small, large = (found[f"{size} MB"] for size in SIZES_MB)
    ratios = {key: large[key] / small[key] for key in ("peak_mb", "peak_anonymous_mb")}
    print(f"{SIZES_MB[1]} over {SIZES_MB[0]} MB: {ratios}; goal {GOAL:g} or less: "
          f"{'met' if ratios['peak_mb'] <= GOAL else 'MISSED'}")
    write_results("data_memory", {"memory": MEMORY, "goal": GOAL, "runs": found, "ratio": ratios})


if __name__ == "__main__":
    main()
