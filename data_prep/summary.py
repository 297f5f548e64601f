"""`summary.html` of a dataset: what was read, what was dropped and why, lengths, copies. One page without a network.

It follows from the manifest and the rows of the shards alone, without times and paths: the same dataset has the same
page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import write_atomic
from data_prep.manifest import Manifest
from data_prep.stats import SplitStats, split_stats

SUMMARY = "summary.html"
_EXAMPLE_CHARACTERS = 400
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th { text-align: left; }
th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .bar { background: #4a78b5; height: .8rem; }
code, pre { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def write_summary(folder: Path, manifest: Manifest) -> None:
    """Write the page of a dataset whose shards are in `folder`."""
    located = manifest.located(folder)
    made = manifest.provenance
    parts = [_splits(located), _sources(made), _drops(made), _changes(made), _copies(made.get("copies") or {}),
             _decontamination(made.get("decontamination")), _tokens(made, manifest)]
    name = f"Dataset {manifest.fingerprint[:16]}"
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
            f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n{''.join(parts)}</body>\n</html>\n")
    write_atomic(folder / SUMMARY, page.encode(errors="backslashreplace"))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right with thousands parted; `Markup` as it is, other text escaped."""
    def cell(value: Any) -> str:
        if isinstance(value, Markup):
            return f"<td>{value}</td>"
        if isinstance(value, int | np.integer):
            return f'<td class="n">{int(value):,}</td>'
        return f'<td class="n">{value:.4g}</td>' if isinstance(value, float) else f"<td>{escape(str(value))}</td>"
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table>\n<tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>\n{lines}</table>\n"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _splits(manifest: Manifest) -> str:
    found = [split_stats(manifest, name) for name in manifest.splits]
    noun = manifest.kind
    rows = [(s.name, s.documents, s.tokens, s.bytes, s.bytes_per_token, s.mean_tokens, s.longest, s.shards)
            for s in found]
    head = ("split", noun, "tokens", "bytes of text", "bytes a token", f"tokens of {noun}", "longest", "shards")
    return f"<h2>Splits</h2>\n{_table(head, rows)}" + "".join(_histogram(stats, noun) for stats in found)


def _histogram(stats: SplitStats, noun: str) -> str:
    counts = stats.histogram.tolist()
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return ""
    most = max(counts)
    rows = [(f"{2**i:,} to {2**(i + 1) - 1:,}", counts[i],
             Markup(f'<div class="bar" style="width: {300 * counts[i] / most:.0f}px"></div>'))
            for i in range(filled[0], filled[-1] + 1)]
    return f"<h3>Lengths in {escape(stats.name)}</h3>\n{_table(('tokens', noun, ''), rows)}"


def _sources(made: dict[str, Any]) -> str:
    rows = []
    for source, outcomes in made["counts"].items():
        total = sum(entry["documents"] for entry in outcomes.values())
        kept = outcomes.get("kept", {"documents": 0, "bytes": 0})
        rows.append((source, total, kept["documents"], f"{kept['documents'] / max(1, total):.1%}", kept["bytes"]))
    return f"<h2>Sources</h2>\n{_table(('source', 'found', 'kept', '', 'bytes kept'), rows)}"


def _drops(made: dict[str, Any]) -> str:
    """What was set aside or dropped, by source and reason, with the first ones."""
    rows = []
    for source, outcomes in made["counts"].items():
        total = sum(entry["documents"] for entry in outcomes.values())
        for reason, entry in sorted(outcomes.items(), key=lambda item: (-item[1]["documents"], item[0])):
            if reason == "kept" or not entry["documents"]:
                continue
            examples = made.get("examples", {}).get(source, {}).get(reason, [])
            rows.append((source, reason, entry["documents"], f"{entry['documents'] / total:.2%}", entry["bytes"],
                         _examples(examples)))
    if not rows:
        return "<h2>Dropped</h2>\n<p>Nothing.</p>\n"
    return f"<h2>Dropped</h2>\n{_table(('source', 'reason', 'documents', '', 'bytes', 'the first ones'), rows)}"


def _examples(examples: list[dict[str, Any]]) -> Markup:
    if not examples:
        return Markup("")
    lines = [json.dumps(example, ensure_ascii=False) for example in examples]
    shown = "\n".join(line if len(line) <= _EXAMPLE_CHARACTERS else line[:_EXAMPLE_CHARACTERS] + " ..."
                      for line in lines)
    return Markup(f"<details><summary>{len(examples)}</summary><pre>{escape(shown)}</pre></details>")


def _changes(made: dict[str, Any]) -> str:
    rows = [(source, what, count) for source, changes in (made.get("changes") or {}).items()
            for what, count in changes.items() if count]
    return f"<h2>Changed by cleaning, and notes</h2>\n{_table(('source', 'what', 'count'), rows)}" if rows else ""


def _copies(copies: dict[str, Any]) -> str:
    if not copies.get("between"):
        return "<h2>Copies</h2>\n<p>None were dropped.</p>\n"
    between = [(entry["kind"], entry["source"], entry["copies_of"], entry["documents"]) for entry in copies["between"]]
    largest = [(entry["copies"], json.dumps(entry["kept"], ensure_ascii=False)) for entry in copies["largest"]]
    return (f"<h2>Copies</h2>\n{_table(('kind', 'dropped from', 'kept in', 'documents'), between)}"
            f"<h3>Most copied</h3>\n{_table(('copies', 'what is kept'), largest)}")


def _decontamination(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [(name, s["items"], s["contaminated"], s["suspicious"], s["unreadable"], s["documents_dropped"])
            for name, s in found["sets"].items()]
    head = ("evaluation set", "items", "contaminated", "touched", "unreadable", "documents dropped")
    boilerplate = found["boilerplate"]
    examples = [(e["documents"], e["evaluation"], e["text"]) for e in boilerplate["examples"]]
    return (f"<h2>Evaluation sets</h2>\n{_table(head, rows)}<p>{boilerplate['ngrams']:,} n-grams of them stand in many "
            f"documents and do not count.</p>\n" + (_table(("documents", "evaluation set", "n-gram"), examples)
                                                   if examples else ""))


def _tokens(made: dict[str, Any], manifest: Manifest) -> str:
    check = made.get("roundtrip") or {"texts": 0, "exact": 0, "unknown_tokens": 0}
    return (f"<h2>Tokenizer</h2>\n<p>{manifest.vocab_size:,} ids; SHA-256 <code>{manifest.tokenizer_sha256}</code>. "
            f"{check['texts']:,} texts were decoded again, {check['exact']:,} came back byte for byte; "
            f"{check['unknown_tokens']:,} unknown tokens.</p>\n<h2>How splits were drawn</h2>\n"
            f"<p>{escape(made.get('split_rule', ''))}</p>\n<h2>Config</h2>\n"
            f"<details><summary>as JSON</summary><pre>{escape(json.dumps(made['config'], indent=1))}</pre></details>\n")
