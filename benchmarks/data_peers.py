"""Preparation beside datatrove on the same JSON lines with the same tokenizer, both in one process on one core.

Ours reads, hashes every text, tokenizes, decodes one in a hundred again, packs, hashes the shards and flushes them to
the disk; cleaning and dedup are off. datatrove reads, tokenizes and writes tokens and an index of documents, in order.
Each pair is of one order and the next in the other; CPU and wall time are of the same runs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.data_memory import write_input
from benchmarks.harness import Comparison, Summary, write_results
from benchmarks.peer_worker import measured
from benchmarks.peers import Peer, make_environment
from data_prep.config import PrepConfig
from data_prep.pipeline import prepare

TEXT_BYTES, PAIRS, GOAL = 8_000_000, 6, 1.3
EOS = "<|endoftext|>"


def main() -> None:
    """Make the environment and measure; a few minutes."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "text").mkdir()
        text = root / "text" / "text.jsonl"
        write_input(text, TEXT_BYTES)

        def config(out: str, **tokenizer: object) -> PrepConfig:
            return PrepConfig.model_validate({
                "out": str(root / out), "sources": [{"kind": "jsonl", "name": "text", "path": str(text)}],
                "splits": {}, "dedup": {"exact": False}, "workers": 1, "tokenizer": tokenizer})
        tokenizer = prepare(config("made", vocab_size=8192)).folder / "tokenizer.json"

        def ours() -> int:
            found = prepare(config("ours", path=str(tokenizer)))
            shutil.rmtree(found.folder)
            return found.splits["train"].tokens
        python = make_environment(root / "environment", ["datatrove", "orjson"])
        pairs = []
        with Peer(python) as peer:
            for number in range(PAIRS + 1):
                sides = {}
                for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                    sides[side] = measured(ours) if side == "ours" else peer.ask(
                        "datatrove", text=str(text), tokenizer=str(tokenizer), eos=EOS, out=str(root / "theirs"))
                tokens = [side["found"] for side in sides.values()]
                if max(tokens) > 1.001 * min(tokens):  # names of special tokens within a text are text to us
                    raise RuntimeError(f"not the same work: {sides}")
                if number:
                    pairs.append(sides)
            known = peer.ask("versions", names=["datatrove", "tokenizers"])
    found = {}
    for clock, unit in (("cpu", "MB/CPU-s"), ("wall", "MB/s")):
        mine, theirs = ([TEXT_BYTES / 1e6 / pair[side][clock] for pair in pairs] for side in ("ours", "theirs"))
        found[clock] = Comparison(Summary.of(mine, unit), Summary.of(theirs, unit),
                                  Summary.of([a / b for a, b in zip(mine, theirs, strict=True)], "x"))
        print(f"{clock}: {found[clock].ratio}; goal {GOAL:g} or more: "
              f"{'met' if found[clock].ratio.median >= GOAL else 'MISSED'} ({found[clock].ours}; {found[clock].other})")
    write_results("data_peers", {"peers": known, "tokens": pairs[0]["ours"]["found"], "goal": GOAL, **found})


if __name__ == "__main__":
    main()
