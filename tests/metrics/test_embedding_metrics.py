"""Figures of embeddings against the libraries of the field, on the same vectors and run files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.metrics.collapse import alignment, effective_rank, mean_cosine, uniformity
from pretrain.metrics.retrieval import exact_search, ndcg, recall, reciprocal_rank
from pretrain.metrics.sts import cosines, pearson, spearman, spearman_interval


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a [n, d], b [n, d], scores [n]) with ties in the scores and one zero vector."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 16)).astype(np.float32)
    b = (0.5 * a + rng.normal(size=a.shape)).astype(np.float32)
    a[3] = 0
    return a, b, np.round(rng.uniform(0, 5, 200) * 4) / 4


def test_sts_is_what_sentence_transformers_computes(pairs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    a, b, gold = pairs

    class Fixed:
        """A model of which only the vectors are asked."""

        similarity_fn_name = "cosine"

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            side, numbers = texts[0][0], [int(text[1:]) for text in texts]
            return (a if side == "a" else b)[numbers]

    evaluator = evaluation.EmbeddingSimilarityEvaluator(
        [f"a{i}" for i in range(200)], [f"b{i}" for i in range(200)], gold.tolist(), main_similarity="cosine",
        write_csv=False)
    evaluator.embed_inputs = lambda model, texts, **kwargs: model.encode(texts)
    evaluator.store_metrics_in_model_card_data = lambda *args, **kwargs: None
    theirs = evaluator(Fixed())
    ours = cosines(a, b)
    assert spearman(ours, gold) == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    assert pearson(ours, gold) == pytest.approx(theirs["pearson_cosine"], abs=1e-6)


def test_spearman_knows_only_ranks_and_its_interval_contains_it(
        pairs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, gold = pairs
    value = spearman(cosines(a, b), gold)
    assert spearman(np.exp(cosines(a, b)), gold) == pytest.approx(value)
    low, high = spearman_interval(cosines(a, b), gold, resamples=300)
    assert low < value < high
    assert high - low < 0.4


def test_constant_vectors_have_no_correlation() -> None:
    assert np.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_retrieval_is_what_trec_eval_computes() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(40, 300))
    judged = [{int(d): float(rng.integers(0, 4)) for d in rng.choice(300, rng.integers(0, 12), replace=False)}
              for _ in range(40)]
    ranked = np.argsort(-scores, axis=1)[:, :100].tolist()
    run = {f"q{q}": {f"d{d}": float(scores[q, d]) for d in ranked[q]} for q in range(40)}
    qrels = {f"q{q}": {f"d{d}": int(gain) for d, gain in relevance.items()} for q, relevance in enumerate(judged)}
    known = {q: gains for q, gains in qrels.items() if gains}
    theirs = pytrec_eval.RelevanceEvaluator(known, {"ndcg_cut.10", "recall.1,5,10,100", "recip_rank"}).evaluate(run)
    ours = {"ndcg_cut_10": ndcg(ranked, judged, 10), "recip_rank": reciprocal_rank(ranked, judged, 100),
            **{f"recall_{k}": recall(ranked, judged, k) for k in (1, 5, 10, 100)}}
    for name, values in ours.items():
        for q in range(40):
            expected = theirs.get(f"q{q}", {}).get(name, 0.0)
            assert values[q] == pytest.approx(expected, abs=1e-6), (name, q)


def test_the_reciprocal_rank_is_zero_beyond_the_cut() -> None:
    assert reciprocal_rank([[1, 2, 3]], [{3: 1.0}], 2).tolist() == [0.0]
    assert reciprocal_rank([[1, 2, 3]], [{3: 1.0}], 3).tolist() == [1 / 3]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_search_in_blocks_finds_what_one_sort_finds(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-3, 4, (13, 4), generator=generator).float()  # integers: many equal scores
    corpus = torch.randint(-3, 4, (150, 4), generator=generator).float()
    scores, numbers = exact_search(queries, corpus, 10, block=block, query_block=5)
    whole = (queries @ corpus.T).numpy()
    expected = np.argsort(-whole, axis=1, kind="stable")[:, :10]
    assert numbers.tolist() == expected.tolist()
    assert torch.equal(scores, torch.from_numpy(np.take_along_axis(whole, expected, 1)))


def test_effective_rank_counts_directions() -> None:
    basis = torch.eye(8)[torch.arange(64) % 8]
    assert effective_rank(torch.cat([basis, -basis])) == pytest.approx(8.0)
    line = torch.linspace(-1, 1, 50)[:, None] * torch.ones(1, 8)
    assert effective_rank(line + 3.0) == pytest.approx(1.0, abs=1e-6)
    assert np.isnan(effective_rank(torch.ones(10, 4)))


def test_collapsed_vectors_are_told_from_spread_ones() -> None:
    spread = torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(400, 128) + 1e-3 * spread
    assert abs(mean_cosine(spread)) < 0.01
    assert mean_cosine(collapsed) > 0.999
    assert uniformity(collapsed) == pytest.approx(0.0, abs=1e-4)
    assert uniformity(spread) == pytest.approx(-4.0, abs=0.1)


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    matrix = unit @ unit.T
    assert mean_cosine(vectors) == pytest.approx(float((matrix.sum() - matrix.trace()) / (20 * 19)))


def test_alignment_of_opposite_vectors_is_four() -> None:
    vectors = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    assert alignment(vectors, 2 * vectors) == pytest.approx(0.0, abs=1e-12)
    assert alignment(vectors, -vectors) == pytest.approx(4.0)
