"""Encoders while they train: validation loss, retrieval, collapse and STS, by all ranks.

Everything is computed on validation. The loss stands at the final temperature and in batches of 32 (Spectra
specification, section 5), so that figures of different steps, worlds and batch sizes compare.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.embedding import Cut as Vectors
from evaluation.embedding import Ranking, cut_vectors
from evaluation.embedding_data import ScoredPairs, StoredJudgements, judgements_of_split, read_scored_pairs
from evaluation.vectors import TextTokens, View, encode
from pretrain.config.contrastive import ContrastiveConfig
from pretrain.config.interval import Interval
from pretrain.config.run import EmbeddingEvalConfig, RunConfig
from pretrain.config.source import PairsConfig
from pretrain.data.open import PADDING_ID, VALIDATION_SPLIT, eval_batches, open_validation, spread
from pretrain.engine.evaluator import EvalResult, Metric, RunView
from pretrain.errors import ConfigError
from pretrain.metrics.collapse import effective_rank, mean_cosine
from pretrain.metrics.retrieval import exact_search
from pretrain.metrics.sts import cosines, spearman, spearman_interval
from pretrain.models.base import EncoderOutput
from pretrain.objectives.embedding_terms import Layout, Triplets, accuracy, scene, terms
from pretrain.objectives.text_chunks import Texts

LOSS_BATCH = 32
"""Triplets of a contrastive batch of the validation loss."""
ANOMALY_STD, SPECTRAL_ENTROPY = 0.01, 1.0
"""Of different texts: least spread of the anomaly score, least entropy of the spectral vector in nats."""
DEAD_MATRICES = 0.3
"""Largest share of weight matrices without any gradient."""
_log = logging.getLogger("pretrain")


class EmbeddingEvaluator:
    """Metrics `val/loss`, `val/accuracy`, `val/ndcg@10`, `val/recall@10`, `val/effective_rank`, `val/mean_cosine`, of
    Spectra `val/anomaly_std` and `val/spectral_entropy`, after an update `val/dead_matrices` (share of weight matrices
    whose gradient was exactly zero in it), and with `eval.embedding.sts` also `val/sts_spearman` (all pairs) and
    `val/sts_quick` (a fixed subset, a log line).
    """

    name = "embedding"

    def __init__(self, every: Interval | None, config: EmbeddingEvalConfig) -> None:
        self.every = every
        self._config = config
        self._pairs: ScoredPairs | None = None
        self._judged: StoredJudgements | None = None

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks, all return the same."""
        found = self._loss(view)
        tokens = tokens_in_training(view.config)
        if self._judged is None:
            source = view.config.data.source
            assert isinstance(source, PairsConfig)
            self._judged = judgements_of_split(Path(source.path), VALIDATION_SPLIT, pool=self._config.pool)
        found |= self._retrieval(view, tokens, self._judged)
        if self._config.sts is not None:
            if self._pairs is None:
                self._pairs = read_scored_pairs(Path(self._config.sts))
            found |= self._sts(view, tokens, self._pairs)
        if view.zero_gradients is not None:
            found["val/dead_matrices"] = Metric(view.zero_gradients, 1, False)
        if view.rank == 0:
            for warning in health_warnings(found, view, self._config):
                _log.warning("[HEALTH] %s", warning)
        return EvalResult(found)

    def _loss(self, view: RunView) -> dict[str, Metric]:
        """Mean over batches of 32 triplets in their stored order; a last batch that is not full is left out."""
        objective = view.config.objective
        assert isinstance(objective, ContrastiveConfig)
        source = open_validation(view.config)
        assert source is not None
        total = np.zeros(3)
        most = None if self._config.loss_triplets is None else min(self._config.loss_triplets, len(source))
        for batch in eval_batches(source, rank=view.rank, world=view.world, batch_size=LOSS_BATCH, max_samples=most):
            texts = Texts.of([batch.to(view.device)])
            chunk = texts.stacked()
            output = view.forward(**chunk.batch.tensors)
            if bool((batch.sample_ids == PADDING_ID).any()):
                continue
            layout = Layout.of(output)
            packed = layout.pack(output).view(-1, LOSS_BATCH, layout.pack(output).shape[1])
            where = scene(objective, Triplets(layout, packed[0], packed[1], packed[2:].transpose(0, 1), texts.ids),
                          objective.temperature_end)
            loss = sum(float(term.weight * term.loss(where)) for term in terms(objective, layout))
            total += (loss, float(accuracy(where)), 1)
        device = torch.device("cpu") if view.device.type == "mps" else view.device
        loss, correct, batches = view.all_reduce(torch.from_numpy(total).to(device)).tolist()
        if not batches:
            raise ConfigError("data.source", f"split {VALIDATION_SPLIT} holds fewer than {LOSS_BATCH} pairs, of which "
                              "a validation loss is formed; give it a larger share")
        n = int(batches) * LOSS_BATCH
        return {"val/loss": Metric(loss / batches, n, False), "val/accuracy": Metric(correct / batches, n, True)}

    def _retrieval(self, view: View, tokens: TextTokens, judged: StoredJudgements) -> dict[str, Metric]:
        """Of the default head and of `eval.embedding.head`; collapse of the former, over passages."""
        chosen = spread(len(judged.queries), self._config.queries).tolist()
        queries = tokens.around([judged.queries[number] for number in chosen])
        relevant = [judged.relevant[number] for number in chosen]
        passages = tokens.around(judged.passages)
        vectors = [Vectors()] if self._config.head is None else [Vectors(), Vectors(self._config.head)]

        def of(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
            return cut_vectors(lambda given, heads: encode(view, given, pad_id=tokens.pad_id, heads=heads), rows,
                               vectors)
        asked, searched = of(queries), of(passages)
        found: dict[str, Metric] = {}
        for number, name in enumerate(asked):
            _, ranked = exact_search(asked[name], searched[name], 100)
            figures = Ranking(ranked.tolist(), relevant).metrics("val")
            suffix = "" if number == len(asked) - 1 else f"/{name}"
            found |= {f"{key}{suffix}": figures[key] for key in ("val/ndcg@10", "val/recall@10")}
        looked_at = spread(len(passages), self._config.collapse_texts).tolist()
        whole = next(iter(searched.values()))[looked_at]
        found["val/effective_rank"] = Metric(effective_rank(whole), len(whole), True)
        found["val/mean_cosine"] = Metric(mean_cosine(whole), len(whole), False)
        rows = [passages[number] for number in looked_at]
        branches = encode(view, rows, pad_id=tokens.pad_id, pick=spectra_figures)
        if branches:
            found["val/anomaly_std"] = Metric(float(branches["anomaly"].double().std()), len(rows), True)
            found["val/spectral_entropy"] = Metric(float(branches["entropy"].double().mean()), len(rows), True)
        return found

    def _sts(self, view: RunView, tokens: TextTokens, pairs: ScoredPairs) -> dict[str, Metric]:
        """Spearman on all pairs, which selects, and on the fixed subset, which is only told."""
        place = progress_name(view)
        main = view.rank == 0
        if main:
            _log.info("[MONITOR] Running quick STS evaluation at step %s...", place)
        head = untrained_semantics(view.config)
        if main and head is not None:
            _log.warning("[MONITOR] STS is that of %s: objective.enable_semantic_nce is false, so that no loss of its "
                         "own trains the semantic head", head)
        n = len(pairs.first)
        rows = tokens([*pairs.first, *pairs.second])
        heads = None if head is None else [head]
        vectors = next(iter(encode(view, rows, pad_id=tokens.pad_id, heads=heads).values())).cpu().numpy()
        alike, gold = cosines(vectors[:n], vectors[n:]), np.asarray(pairs.scores)
        subset = np.random.default_rng(0).permutation(n)[:self._config.quick_pairs]
        value, quick = spearman(alike, gold), spearman(alike[subset], gold[subset])
        if main:
            target = self._config.target_sts
            beside = "" if target is None else f" | Target: {target:.4f} | Progress: {100 * quick / target:.1f}%"
            _log.info("[MONITOR] STS-B: %.4f%s", quick, beside)
            _log.info("[MONITOR] STS-B of all %d pairs: %.4f (above: %d of them)", n, value, len(subset))
        return {"val/sts_spearman": Metric(value, n, True, spearman_interval(alike, gold, resamples=200)),
                "val/sts_quick": Metric(quick, len(subset), True)}


def untrained_semantics(config: RunConfig) -> str | None:
    """The head that STS is measured on where Spectra trains without the loss of the semantic one; else None."""
    objective, width = config.objective, getattr(config.model, "ranking_dim", None)
    if width is None or not isinstance(objective, ContrastiveConfig) or objective.trains_semantic:
        return None
    return f"ranking_{width}"


def spectra_figures(output: EncoderOutput) -> dict[str, torch.Tensor]:
    """Of encoders that have them: each text's anomaly score and the entropy of its spectral vector in nats, [b, 1]."""
    aux = output.aux or {}
    if "anomaly_score" not in aux or "spectral" not in aux:
        return {}
    shares = aux["spectral"].float().softmax(-1)
    return {"anomaly": aux["anomaly_score"].float()[:, None],
            "entropy": -torch.xlogy(shares, shares).sum(-1, keepdim=True)}


def health_warnings(found: Mapping[str, Metric], view: RunView, config: EmbeddingEvalConfig) -> list[str]:
    """What an evaluation says of a model that has collapsed; nothing before `health_after` (section 10)."""
    done = view.config.batch.resolve(view.world).progress(view.step, view.config.data.tokens_per_sample)
    if done.in_unit(config.health_after.unit) < config.health_after.amount:
        return []
    rules = (("val/mean_cosine", ">", config.collapse_warn, "the vectors of different texts have come to look alike"),
             ("val/effective_rank", "<", config.rank_warn, "the vectors use few of their dimensions"),
             ("val/anomaly_std", "<", ANOMALY_STD, "the anomaly score is the same for all texts"),
             ("val/spectral_entropy", "<", SPECTRAL_ENTROPY, "the spectral vectors stand on one coordinate"),
             ("val/dead_matrices", ">", DEAD_MATRICES, "so many weight matrices had no gradient at all"))
    told = []
    for name, sign, limit, meaning in rules:
        value = found[name].value if name in found else None
        if value is not None and not (value <= limit if sign == ">" else value >= limit):
            side = "no number" if math.isnan(value) else f"{'above' if sign == '>' else 'below'} {limit:g}"
            told.append(f"step {view.step}: {name} {value:.3g} is {side}: {meaning}")
    return told


def progress_name(view: RunView) -> str:
    """Where the run stands in the unit of `eval.every`, as the multiple that was due."""
    every = view.config.eval.every
    if every is None or every.unit not in ("steps", "micro_steps"):
        return str(view.step)
    batch = view.config.batch.resolve(view.world)
    here = view.step * (batch.gradient_accumulation_steps if every.unit == "micro_steps" else 1)
    return str(int(max(1, math.floor(here / every.amount)) * every.amount) if here else 0)


def tokens_in_training(config: RunConfig) -> TextTokens:
    """How the run's own dataset frames texts. Raises ConfigError for runs on other data than pairs."""
    source = config.data.source
    if not isinstance(source, PairsConfig):
        raise ConfigError("data.source.kind", "encoders are evaluated on pairs while they train; use kind: pairs")
    longest = max(source.query_length, source.passage_length)
    limit = config.model.max_seq_len
    return TextTokens.of_dataset(Path(source.path), longest if limit is None else min(longest, limit))
