"""The model card of an export: what it is, what it learned from, what it reaches, how to load it."""

from __future__ import annotations

import json
from typing import Any

from evaluation.comparison import comparison
from evaluation.results import Results
from evaluation.tables import with_interval


def model_card(provenance: dict[str, Any], results: Results | None, config_text: str) -> str:
    """Markdown.

    Args:
        provenance: as written to provenance.json beside the card.
        results: the evaluation of these very weights; None where there is none.
        config_text: config.yaml of the run.
    """
    library, tag = ("sentence-transformers", "sentence-similarity") if "encoder" in provenance else \
        ("transformers", "text-generation")
    front = f"---\nlibrary_name: {library}\npipeline_tag: {tag}\n---\n"
    parts = [front, f"# {provenance['run']}\n", _summary(provenance), "## How to load\n", _loading(provenance),
             "## Figures\n", _figures(results), "## Data\n", _data(provenance["dataset"]), "## Training\n",
             f"`training_config.yaml` beside this file, the resolved config:\n\n```yaml\n{config_text}```\n",
             "## Integrity\n",
             "`provenance.json` holds the SHA-256 of every other file. The export was loaded in a fresh process before "
             f"it was published: its {provenance['verification']['compared']} differed from the checkpoint's by at "
             f"most {provenance['verification']['largest_difference']:.3g} on "
             f"{provenance['verification']['tokens']} stored tokens ({provenance['dtype']}, tolerance "
             f"{provenance['verification']['tolerance']:g} of the largest).\n"]
    return "\n".join(parts)


def _summary(p: dict[str, Any]) -> str:
    model = p["model"]
    return (f"{p['architecture']} of the family `{model['family']}`, {model['parameters']:,} parameters, weights in "
            f"{p['dtype']}. Step {p['step']:,} of the run, {p['train_tokens']:,} tokens.\n")


def _loading(p: dict[str, Any]) -> str:
    if "encoder" in p:
        return _loading_encoder(p)
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[p["dtype"]]
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if not p["native"]:
        lines.append(f"import {p['module']}  # registers the architecture")
    lines += [f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype={dtype})']
    if p["tokenizer_sha256"]:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(FOLDER)")
    text = "```python\n" + "\n".join(lines) + "\n```\n"
    if p["native"] and p["document_masking"]:
        text += ("\nThe model was trained with documents kept apart: attention and positions restart at each "
                 "end-of-text token. Give it one document at a time.\n")
    return text


def _loading_encoder(p: dict[str, Any]) -> str:
    encoder = p["encoder"]
    vector = encoder["head"] if encoder["dim"] is None else f"{encoder['head']}, its first {encoder['dim']} coordinates"
    lines = [f"Vectors of length 1: {vector}.\n", "With the package of this project installed:\n", "```python"]
    if encoder["max_length"] is not None:
        lines += ["from sentence_transformers import SentenceTransformer",
                  "# The flag lets that package run; this folder holds no code.",
                  "model = SentenceTransformer(FOLDER, trust_remote_code=True)",
                  'vectors = model.encode(["a text"])', "```\n", f"Texts are cut at {encoder['max_length']} tokens. "
                  "All heads: `pretrain embed FOLDER --texts \"a text\" --head NAME`.\n"]
    else:
        lines += ["from evaluation.target import open_target",
                  "heads = open_target(FOLDER).forward(input_ids=..., attention_mask=...).heads", "```\n"]
    return "\n".join(lines)


def _figures(results: Results | None) -> str:
    if results is None:
        return "These weights were not evaluated.\n"
    lines = ["| metric | value (95% interval) | n |", "|---|---:|---:|"]
    lines += [f"| {name} | {with_interval(m, 4)} | {m.n:,} |" for name, m in results.metrics.items()]
    rows = comparison(results)
    if len(rows) > 1:
        lines += ["", "| on the same tokens | trained on tokens | nats/token | perplexity | bits/byte |",
                  "|---|---:|---:|---:|---:|"]
        for row in rows:
            tokens = "-" if row.train_tokens is None else f"{row.train_tokens:,}"
            per_byte = "-" if row.bits_per_byte is None else f"{row.bits_per_byte.value:.3f}"
            lines.append(f"| {row.label} | {tokens} | {row.loss.value:.3f} | {row.perplexity.value:.2f} | {per_byte} |")
    split = results.dataset.get("split", "?")
    lines += ["", f"Split `{split}`, dtype {results.dtype}, batch size {results.batch_size}, {results.created}."]
    return "\n".join(lines) + "\n"


def _data(dataset: dict[str, Any]) -> str:
    if not dataset:
        return "The run does not name a prepared dataset.\n"
    lines = [f"Dataset fingerprint `{dataset['fingerprint']}`.", "", "| split | documents | tokens | bytes |",
             "|---|---:|---:|---:|"]
    lines += [f"| {name} | {s['docs']:,} | {s['tokens']:,} | {s['bytes']:,} |" for name, s in dataset["splits"].items()]
    stated = json.dumps(dataset["provenance"], indent=1, ensure_ascii=False)
    lines += ["", "Sources, counts and the rule of the split, as stated by the dataset:", "", "```json", stated, "```"]
    return "\n".join(lines) + "\n"
